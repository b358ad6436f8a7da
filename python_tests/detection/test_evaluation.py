"""COCO metrics: perfect, empty, shifted and misnamed detections, and original pixels."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch

from hqod_ops.detection.data import DigitScenes
from hqod_ops.detection.data.coco_format import Annotation, coco_dict
from hqod_ops.detection.evaluation import METRICS, coco_results, evaluate_coco

pytestmark = pytest.mark.require("pycocotools", "faster_coco_eval", "sklearn")


@pytest.fixture(scope="module")
def data() -> DigitScenes:
    return DigitScenes("val", num_images=20)


def perfect(data: DigitScenes) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    targets = [data[i][1] for i in range(len(data))]
    outputs = [
        {"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(len(t["labels"]))}
        for t in targets
    ]
    return outputs, targets


def test_perfect_detections(data: DigitScenes, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = evaluate_coco(data.coco_ground_truth, coco_results(*perfect(data)))
    assert list(metrics) == list(METRICS)
    for name in ("AP", "AP50", "AP75", "APs", "APm", "AR"):
        assert metrics[name] == pytest.approx(1)
    assert math.isnan(metrics["APl"])  # there is no digit of 96 x 96
    assert capsys.readouterr().out == ""


def test_no_detections(data: DigitScenes) -> None:
    metrics = evaluate_coco(data.coco_ground_truth, [])
    assert metrics["AP"] == metrics["AP50"] == metrics["AR"] == 0
    assert math.isnan(metrics["APl"])


def test_no_objects() -> None:
    image = {"id": 1, "file_name": "x", "width": 9, "height": 9}
    metrics = evaluate_coco(coco_dict(["a"], [image], []), [])
    assert all(math.isnan(value) for value in metrics.values())


def test_wrong_class_or_place_counts_nothing(data: DigitScenes) -> None:
    outputs, targets = perfect(data)
    renamed = [{**output, "labels": (output["labels"] + 1) % 10} for output in outputs]
    moved = [{**output, "boxes": output["boxes"] + 200} for output in outputs]
    for wrong in (renamed, moved):
        assert evaluate_coco(data.coco_ground_truth, coco_results(wrong, targets))["AP50"] < 0.05


def test_ap_of_one_shifted_box() -> None:
    """IoU 2/3 passes four of the ten thresholds, 0.5 to 0.65."""
    image = {"id": 1, "file_name": "x", "width": 99, "height": 99}
    truth = coco_dict(["a"], [image], [Annotation(1, 0, (0, 0, 50, 10))])
    found = [{"image_id": 1, "category_id": 0, "bbox": [10.0, 0.0, 50.0, 10.0], "score": 0.5}]
    metrics = evaluate_coco(truth, found)
    assert metrics["AP50"] == pytest.approx(1) and metrics["AP75"] == 0
    assert metrics["AP"] == pytest.approx(0.4)


def test_false_detection_above_the_right_one_halves_ap() -> None:
    image = {"id": 1, "file_name": "x", "width": 99, "height": 99}
    truth = coco_dict(["a"], [image], [Annotation(1, 0, (0, 0, 50, 10))])
    found = [
        {"image_id": 1, "category_id": 0, "bbox": [0.0, 0.0, 50.0, 10.0], "score": 0.5},
        {"image_id": 1, "category_id": 0, "bbox": [0.0, 50.0, 50.0, 10.0], "score": 0.9},
    ]
    assert evaluate_coco(truth, found)["AP"] == pytest.approx(0.5)
    found[1]["score"] = 0.1
    assert evaluate_coco(truth, found)["AP"] == pytest.approx(1)


def test_crowd_is_neither_for_nor_against() -> None:
    image = {"id": 1, "file_name": "x", "width": 99, "height": 99}
    notes = [Annotation(1, 0, (0, 0, 50, 10)), Annotation(1, 0, (0, 50, 90, 90), iscrowd=1)]
    found = [
        {"image_id": 1, "category_id": 0, "bbox": [0.0, 0.0, 50.0, 10.0], "score": 0.5},
        {"image_id": 1, "category_id": 0, "bbox": [5.0, 60.0, 10.0, 10.0], "score": 0.9},
    ]
    assert evaluate_coco(coco_dict(["a"], [image], notes), found)["AP"] == pytest.approx(1)


def test_inputs_are_left_alone(data: DigitScenes) -> None:
    found = coco_results(*perfect(data))
    truth = data.coco_ground_truth
    evaluate_coco(truth, found)
    assert set(found[0]) == {"image_id", "category_id", "bbox", "score"}
    assert [note["id"] for note in truth["annotations"][:2]] == [1, 2]


def test_results_are_in_original_pixels() -> None:
    output = {
        "boxes": torch.tensor([[10.0, 10.0, 30.0, 20.0]], requires_grad=True),
        "scores": torch.tensor([0.25]),
        "labels": torch.tensor([2]),
    }
    target = {"image_id": 5, "scale": torch.tensor([2.0, 0.5])}
    assert coco_results([output], [target]) == [
        {"image_id": 5, "category_id": 2, "bbox": [5.0, 20.0, 10.0, 20.0], "score": 0.25}
    ]


def test_bad_input(data: DigitScenes) -> None:
    outputs, targets = perfect(data)
    with pytest.raises(ValueError, match="expected as many, got 1 and 2"):
        coco_results(outputs[:1], targets[:2])
    broken = {**outputs[0], "scores": torch.ones(9)}
    with pytest.raises(ValueError, match=r"expected boxes \[D, 4\], scores \[D\]"):
        coco_results([broken], targets[:1])
    found = {"image_id": 99, "category_id": 0, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 1.0}
    with pytest.raises(ValueError, match="expected a image_id of the ground truth, got 99"):
        evaluate_coco(data.coco_ground_truth, [found])
    with pytest.raises(ValueError, match="category_id of the ground truth, got 10"):
        evaluate_coco(data.coco_ground_truth, [{**found, "image_id": 0, "category_id": 10}])


def random_scene(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Boxes of five classes, one without objects, some in crowds; detections with tied scores."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    images = [{"id": i, "file_name": f"{i}", "width": 300, "height": 300} for i in range(12)]
    truth, found = coco_dict(list("abcde"), images, []), []
    for image in images:
        for _ in range(number(0, 9)):
            box = [float(number(0, 150)), float(number(0, 150)), *(float(number(4, 140)),) * 2]
            label = number(0, 4)
            entry = {"image_id": image["id"], "category_id": label, "bbox": box}
            truth["annotations"].append(
                {**entry, "id": len(truth["annotations"]) + 1, "area": box[2] * box[3]}
                | {"iscrowd": int(number(0, 6) == 0)}
            )
            for _ in range(number(0, 3)):
                moved = [value + number(-9, 10) for value in box[:2]] + box[2:]
                score = number(1, 8) / 8
                label = label if number(0, 5) else number(0, 5)
                found.append({**entry, "category_id": label, "bbox": moved, "score": score})
    return truth, found


@pytest.mark.numeric
@pytest.mark.parametrize("seed", range(8))
def test_evaluators_agree(seed: int) -> None:
    """The fast one has the slow one's numbers, to the last bit or two, of each category too."""
    truth, found = random_scene(seed)
    fast, slow = (
        evaluate_coco(truth, found, categories=True, evaluator=name)
        for name in ("faster-coco-eval", "pycocotools")
    )
    assert list(fast) == list(slow) == [*METRICS, *(f"AP/{name}" for name in "abcde")]
    assert fast == pytest.approx(slow, rel=1e-12, nan_ok=True)
    assert 0 < fast["AP"] < 1 and math.isnan(fast["AP/e"])
    mean = [value for name, value in fast.items() if "/" in name and value == value]
    assert fast["AP"] == pytest.approx(sum(mean) / len(mean))


def test_unknown_evaluator() -> None:
    with pytest.raises(ValueError, match="evaluator: expected one of .*'pycocotools' or None"):
        evaluate_coco(*random_scene(0), evaluator="coco")


def test_without_the_fast_one(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = evaluate_coco(*random_scene(0))
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert evaluate_coco(*random_scene(0)) == pytest.approx(wanted, nan_ok=True)
    with pytest.raises(ImportError, match=r"faster-coco-eval is needed .*hqod_ops\[detection\]"):
        evaluate_coco(*random_scene(0), evaluator="faster-coco-eval")
