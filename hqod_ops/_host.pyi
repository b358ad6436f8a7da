import numpy as np
from numpy.typing import ArrayLike, NDArray

def match_detections(
    det_boxes: ArrayLike,
    det_scores: ArrayLike,
    det_labels: ArrayLike,
    gt_boxes: ArrayLike,
    gt_labels: ArrayLike,
    iou_threshold: float,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]: ...
def build_info() -> dict[str, str]: ...
