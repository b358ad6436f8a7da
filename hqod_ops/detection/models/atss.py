"""The ATSS detector: anchors, training loss and detections around its network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import batched_nms, clip_boxes_to_image

from hqod_ops.detection.models import ATSSNetwork, RawOutputs
from hqod_ops.detection.models.assigner import atss_assign
from hqod_ops.detection.models.detector import Detections, Detector, Objects
from hqod_ops.detection.models.losses import atss_losses, gather_targets
from hqod_ops.detection.models.options import LossConfig, ModelConfig, TestConfig

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
LOG_SIZE_LIMIT = math.log(1000 / 16)
"""Bound of the decoded log-sizes, both ways."""


class ATSS(Detector):
    """ATSS: one square anchor a place, positives chosen by the statistics of their IoU.

    Args:
        config (ModelConfig): the network and the anchors.
        num_classes (int): number of classes, background not counted.
        loss (LossConfig, optional): weights and HQOD options. Default: None, LossConfig()
        test (TestConfig, optional): thresholds and limits. Default: None, TestConfig()

    Attributes:
        network (nn.Module): images to :class:`RawOutputs`; may be replaced by its quantized form.

    Source: ATSS (arXiv:1912.02424).

    Example:
        >>> import torch
        >>> from hqod_ops.detection.models.atss import ATSS
        >>> from hqod_ops.detection.models.options import LossConfig, ModelConfig
        >>> model = ATSS(ModelConfig(), num_classes=10, loss=LossConfig(hqod=True))
        >>> target = {"boxes": torch.tensor([[4., 4., 24., 24.]]), "labels": torch.tensor([3])}
        >>> sorted(model.losses(torch.rand(1, 3, 32, 32), [target]))
        ['box', 'centerness', 'cls', 'hqod']
        >>> len(model.eval().detect(torch.rand(2, 3, 32, 32)))
        2
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        loss: LossConfig | None = None,
        test: TestConfig | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.loss_config, self.test_config = loss or LossConfig(), test or TestConfig()
        network = ATSSNetwork(config, num_classes)
        self.strides = network.backbone.strides
        self.stride = self.strides[-1]
        self.network: nn.Module = network
        sizes = tuple((round(config.anchor_scale * stride),) for stride in self.strides)
        self._generator = AnchorGenerator(sizes, ((1.0,),) * len(sizes))
        self._coder = BoxCoder(DELTA_WEIGHTS, bbox_xform_clip=LOG_SIZE_LIMIT)
        self._anchors: dict[tuple[int, int, torch.device], list[Tensor]] = {}

    def forward(self, images: Tensor) -> RawOutputs:
        """Raw predictions: see :class:`RawOutputs`.

        Args:
            images (Tensor[B, 3, H, W]): normalised images.
        """
        return RawOutputs(*self.network(images))

    def anchors(self, images: Tensor) -> list[Tensor]:
        """Anchors of every level for images of this size, Tensor[A_i, 4] in pixels."""
        height, width = images.shape[-2:]
        key = (height, width, images.device)
        if key not in self._anchors:
            self._generator.set_cell_anchors(torch.float32, images.device)
            grids = [[-(-height // s), -(-width // s)] for s in self.strides]
            steps = [
                [torch.tensor(s, device=images.device), torch.tensor(s, device=images.device)]
                for s in self.strides
            ]
            self._anchors[key] = self._generator.grid_anchors(grids, steps)
        return self._anchors[key]

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Boxes from deltas, log-sizes bounded both ways.

        Args:
            deltas (Tensor[N, 4]): encoded boxes.
            anchors (Tensor[N, 4]): their anchors, in pixels.

        Returns:
            Tensor[N, 4]: boxes (x1, y1, x2, y2), in pixels.
        """
        floor = deltas.new_tensor([-math.inf, -math.inf, *[-LOG_SIZE_LIMIT * DELTA_WEIGHTS[2]] * 2])
        boxes: Tensor = self._coder.decode_single(
            torch.maximum(deltas.float(), floor.float()), anchors
        )
        return boxes

    def losses(
        self, images: Tensor, targets: Sequence[Objects], config: LossConfig | None = None
    ) -> dict[str, Tensor]:
        """See :meth:`Detector.losses`; the terms are those of
        :func:`hqod_ops.detection.models.losses.atss_losses`.

        Args:
            images (Tensor[B, 3, H, W]), targets (sequence of mapping): as there.
            config (LossConfig, optional): weights and HQOD options. Default: None, the model's own
        """
        config = config or self.loss_config
        outputs = self(images)
        levels = self.anchors(images)
        boxes = [t["boxes"].float() for t in targets]
        assigned = atss_assign(levels, boxes, config.topk)
        position, matched, labels = gather_targets(assigned, boxes, [t["labels"] for t in targets])
        anchors = torch.cat(levels)[position % outputs.centerness.shape[1]]
        decoded = self.decode(outputs.deltas.flatten(0, 1)[position], anchors)
        return atss_losses(outputs, anchors, decoded, position, labels, matched, config)

    @torch.no_grad()
    def detect(self, images: Tensor, config: TestConfig | None = None) -> list[Detections]:
        """See :meth:`Detector.detect`.

        A detection's score is the class score times the centerness; the threshold is on the class
        score alone, as in ATSS.

        Args:
            images (Tensor[B, 3, H, W]): as there.
            config (TestConfig, optional): thresholds and limits. Default: None, the model's own
        """
        config = config or self.test_config
        outputs = self(images)
        anchors = torch.cat(self.anchors(images))
        scores, centre = outputs.logits.float().sigmoid(), outputs.centerness.float().sigmoid()
        return [
            self._select(scores[i], centre[i], outputs.deltas[i], anchors, images, config)
            for i in range(len(images))
        ]

    def _select(
        self,
        scores: Tensor,
        centre: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        images: Tensor,
        config: TestConfig,
    ) -> Detections:
        kept = (scores > config.score_threshold).nonzero()
        best = scores[kept[:, 0], kept[:, 1]].topk(min(config.candidates, len(kept))).indices
        place, labels = kept[best].unbind(1)
        boxes = self.decode(deltas[place], anchors[place])
        boxes = clip_boxes_to_image(boxes, (images.shape[-2], images.shape[-1]))
        final = scores[place, labels] * centre[place]
        keep = batched_nms(boxes, final, labels, config.nms_iou)[: config.max_detections]
        return {"boxes": boxes[keep], "scores": final[keep], "labels": labels[keep]}
