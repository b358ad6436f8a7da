"""Matching against a plain loop and pycocotools; correlations against SciPy; the lazy imports."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hqod_ops.detection import harmony
from hqod_ops.detection.harmony import HarmonyReport, harmony_report, match_detections

Matcher = Callable[..., tuple[Any, Any]]


@pytest.fixture(
    params=[pytest.param("native", marks=pytest.mark.require("hqod_ops._host")), "numpy"]
)
def match(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Matcher:
    """match_detections, in C++ and in NumPy."""
    if request.param == "numpy":
        monkeypatch.setattr(harmony, "_match_native", None)
    else:
        assert harmony._match_native is not None
    return match_detections


def iou(a: list[float], b: list[float]) -> float:
    inter = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [max(x[2] - x[0], 0) * max(x[3] - x[1], 0) for x in (a, b)]
    return inter / max(areas[0] + areas[1] - inter, 1e-6)


def match_by_loop(
    boxes: Any, scores: Any, labels: Any, truth: Any, truth_labels: Any, threshold: float
) -> tuple[list[int], list[float]]:
    matched, ious, taken = [-1] * len(boxes), [0.0] * len(boxes), set()
    for d in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        best, best_iou = -1, threshold
        for g in range(len(truth)):
            if g in taken or truth_labels[g] != labels[d]:
                continue
            value = iou(boxes[d], truth[g])
            if value >= best_iou:
                best, best_iou = g, value
        if best >= 0:
            taken.add(best)
            matched[d], ious[d] = best, best_iou
    return matched, ious


# Small whole numbers: many ties of score and IoU, empty and inverted boxes. Their areas are exact
# in every order of evaluation, so the matches must be equal.
boxes_strategy = st.lists(st.tuples(*[st.integers(-2, 6)] * 4).map(list), max_size=8)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Any, ...]:
    boxes, truth = draw(boxes_strategy), draw(boxes_strategy)
    scores = draw(st.lists(st.sampled_from([0.25, 0.5, 0.75]), min_size=len(boxes),
                           max_size=len(boxes)))  # fmt: skip
    label = st.integers(0, 1)
    labels = draw(st.lists(label, min_size=len(boxes), max_size=len(boxes)))
    truth_labels = draw(st.lists(label, min_size=len(truth), max_size=len(truth)))
    return boxes, scores, labels, truth, truth_labels, draw(st.sampled_from([0.1, 0.5, 1.0]))


@given(scene=scenes())
def test_matches_equal_those_of_a_loop(scene: tuple[Any, ...]) -> None:
    expected = match_by_loop(*scene)
    arrays = [np.array(x, dtype=np.float64).reshape(-1, 4) for x in (scene[0], scene[3])]
    labels = [np.array(x, dtype=np.int64) for x in (scene[2], scene[4])]
    scores = np.array(scene[1], dtype=np.float64)
    ways = [match_detections(*scene)]
    ways.append(harmony._match_numpy(arrays[0], scores, labels[0], arrays[1], labels[1], scene[5]))
    for matched, ious in ways:
        assert matched.tolist() == expected[0]
        assert ious.tolist() == expected[1]


@pytest.mark.require("pycocotools")
def test_matches_equal_those_of_coco(match: Matcher) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    for _ in range(20):
        corner = rng.uniform(0, 20, (12, 2))
        truth = np.concatenate([corner, corner + rng.uniform(5, 15, (12, 2))], 1)
        boxes = np.repeat(truth, 3, 0) + rng.normal(0, 1.5, (36, 4))
        scores = rng.permutation(36) / 36
        truth_labels = rng.integers(0, 2, 12)
        labels = np.repeat(truth_labels, 3)
        matched, ious = match(boxes, scores, labels, truth, truth_labels, 0.5)
        coco = []
        for rectangles, classes in ((truth, truth_labels), (boxes, labels)):
            one = COCO()
            one.dataset = {
                "images": [{"id": 0}],
                "categories": [{"id": 0}, {"id": 1}],
                "annotations": [
                    {"id": i + 1, "image_id": 0, "category_id": int(c), "iscrowd": 0,
                     "area": 1.0, "bbox": [*r[:2], *(r[2:] - r[:2])], "score": float(s)}
                    for i, (r, c, s) in enumerate(
                        zip(rectangles, classes, np.resize(scores, len(classes)), strict=True)
                    )
                ],
            }  # fmt: skip
            one.createIndex()
            coco.append(one)
        evaluator = COCOeval(*coco, "bbox")
        evaluator._prepare()
        evaluator.params.maxDets = [100]
        evaluator.ious = {(0, c): evaluator.computeIoU(0, c) for c in (0, 1)}
        expected = np.full(36, -1)
        for c in (0, 1):
            result = evaluator.evaluateImg(0, c, [0, 1e10], 100)
            for found, partner in zip(result["dtIds"], result["dtMatches"][0], strict=True):
                expected[found - 1] = int(partner) - 1
        assert (matched == expected).all()
        assert ((ious >= 0.5) == (matched >= 0)).all()


def test_box_matches_itself_at_threshold_1(match: Matcher) -> None:
    """49 * (1 / 49) is below 1: the IoU must come from a division."""
    assert match([[0, 0, 7, 7]], [0.5], [0], [[0, 0, 7, 7]], [0], 1.0)[1].tolist() == [1.0]


def test_each_object_is_found_once(match: Matcher) -> None:
    truth = [[0, 0, 10, 10], [0, 0, 10, 9]]
    matched, ious = match([[0, 0, 10, 10]] * 3, [0.2, 0.9, 0.5], [0, 0, 0], truth, [0, 0], 0.5)
    assert matched.tolist() == [-1, 0, 1]
    np.testing.assert_allclose(ious, [0, 1, 0.9])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layouts(match: Matcher, dtype: Any) -> None:
    rng = np.random.default_rng(1)
    boxes = np.sort(rng.uniform(0, 9, (5, 2, 2)), axis=1).reshape(5, 4).astype(dtype)
    scores, labels = rng.uniform(size=5).astype(dtype), np.zeros(5, dtype=np.int32)
    expected = match(boxes, scores, labels, boxes, labels, 0.5)
    strided = np.repeat(boxes, 2, axis=0)[::2]
    turned = np.asfortranarray(boxes)
    for form in (strided, turned, boxes.tolist(), torch.from_numpy(boxes)):
        matched, ious = match(form, scores[::-1][::-1], labels, form, labels, 0.5)
        assert (matched == expected[0]).all() and (ious == expected[1]).all()
    assert expected[0].tolist() == [0, 1, 2, 3, 4]
    assert expected[0].dtype == np.int64 and expected[1].dtype == np.float64


def test_empty(match: Matcher) -> None:
    matched, ious = match([], [], [], [], [])
    assert matched.shape == ious.shape == (0,)
    assert match([[0, 0, 1, 1]], [0.5], [1], [], [])[0].tolist() == [-1]
    assert match([], [], [], [[0, 0, 1, 1]], [1])[0].shape == (0,)


GOOD: dict[str, Any] = {
    "det_boxes": [[0, 0, 1, 1]],
    "det_scores": [0.5],
    "det_labels": [1],
    "gt_boxes": [[0, 0, 1, 1]],
    "gt_labels": [1],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"det_boxes": [[0, 0, 1]]}, r"det_boxes: expected shape \[1, 4\], got \[1, 3\]"),
        ({"det_boxes": [0, 0, 1, 1]}, r"det_boxes: expected shape \[4, 4\], got \[4\]"),
        ({"det_scores": [0.5, 0.6]}, r"det_scores: expected shape \[1\], got \[2\]"),
        ({"det_scores": 0.5}, r"det_scores: expected shape \[1\], got \[\]"),
        ({"det_labels": [[1]]}, r"det_labels: expected shape \[1\], got \[1, 1\]"),
        ({"det_labels": [1.0]}, "det_labels: expected whole numbers, got an array of float64"),
        ({"gt_boxes": np.zeros((0, 5))}, r"gt_boxes: expected shape \[0, 4\], got \[0, 5\]"),
        ({"gt_labels": []}, r"gt_labels: expected shape \[1\], got \[0\]"),
        ({"det_scores": [math.nan]}, "det_scores: expected finite values"),
        ({"gt_boxes": [[0, 0, math.inf, 1]]}, "gt_boxes: expected finite values"),
        ({"det_boxes": [["a", 0, 1, 1]]}, "det_boxes: expected an array of numbers"),
        ({"iou_threshold": 0.0}, r"iou_threshold: expected a value in \(0, 1\], got 0.0"),
        ({"iou_threshold": math.nan}, r"iou_threshold: expected a value in \(0, 1\], got nan"),
    ],
    ids=str,
)
def test_bad_input(match: Matcher, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match(**{**GOOD, **changes})


@pytest.mark.require("hqod_ops._host")
def test_host_module() -> None:
    from hqod_ops import _host

    info = _host.build_info()
    assert set(info) == {"compiler", "cxx_standard", "build_type"}
    assert info["cxx_standard"] == "C++20" and all(info.values())
    with pytest.raises(TypeError):
        _host.match_detections(**{**GOOD, "det_labels": np.array([1.5])}, iou_threshold=0.5)


@pytest.mark.require("scipy")
def test_correlations_equal_scipys() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    ious = rng.uniform(size=400).round(2)  # with ties
    report = HarmonyReport((ious + rng.normal(0, 0.2, 400)).clip(0, 1), ious, bins=10)
    assert report.pearson == pytest.approx(stats.pearsonr(report.scores, ious).statistic)
    assert report.spearman == pytest.approx(stats.spearmanr(report.scores, ious).statistic)
    assert report.gap == pytest.approx(np.abs(report.scores - ious).mean())
    assert report.num_matches == 400
    assert report.density.shape == (10, 10)
    assert report.density.mean() == pytest.approx(1)
    column = (ious >= 0.9).sum() / 400 * 10
    assert report.density[:, 9].mean() == pytest.approx(column)


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5]], ids=len)
def test_correlation_of_nothing_is_nan(values: list[float]) -> None:
    report = HarmonyReport(np.array(values), np.array(values))
    assert math.isnan(report.pearson) and math.isnan(report.spearman)
    assert report.density.shape == (50, 50)
    assert report.gap == 0 if values else math.isnan(report.gap)


def output(*rows: tuple[list[float], float, int]) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor([row[0] for row in rows]).reshape(-1, 4),
        "scores": torch.tensor([row[1] for row in rows]),
        "labels": torch.tensor([row[2] for row in rows], dtype=torch.int64),
    }


def test_report_takes_the_best_of_the_same_class() -> None:
    target = {
        "boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0], [20.0, 0, 30, 10]]),
        "labels": torch.tensor([1, 2, 1]),
        "iscrowd": torch.tensor([0, 0, 1]),
    }
    found = output(
        ([0.0, 0.0, 10.0, 8.0], 0.9, 1),  # 0.8 with its class, 1 with another
        ([0.0, 0.0, 10.0, 5.0], 0.5, 1),  # the same object once more
        ([0.0, 0.0, 10.0, 0.5], 0.5, 1),  # IoU 0.05
        ([0.0, 0.0, 10.0, 10.0], 0.01, 1),  # score too low
        ([20.0, 0.0, 30.0, 10.0], 0.5, 1),  # a crowd
        ([50.0, 50.0, 60.0, 60.0], 0.5, 1),  # nothing there
    )
    report = harmony_report([found, output()], [target, target])
    np.testing.assert_allclose(report.scores, [0.9, 0.5])
    np.testing.assert_allclose(report.ious, [0.8, 0.5])
    assert report.as_dict()["num_matches"] == 2
    single = harmony_report([found], [target], one_to_one=True)
    np.testing.assert_allclose(single.ious, [0.8])
    loose = harmony_report([found], [target], min_iou=0.0, min_score=0.0)
    np.testing.assert_allclose(loose.ious, [0.8, 0.5, 0.05, 1.0])


def test_report_of_half_precision() -> None:
    target = {"boxes": torch.tensor([[0.0, 0.0, 8.0, 8.0]]), "labels": torch.tensor([1])}
    found = output(([0.0, 0.0, 8.0, 4.0], 0.75, 1))
    half = {**found, "boxes": found["boxes"].bfloat16(), "scores": found["scores"].bfloat16()}
    report = harmony_report([half], [target])
    assert report.scores.tolist() == [0.75] and report.ious.tolist() == [0.5]


def test_report_without_objects() -> None:
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    report = harmony_report([output(([0.0, 0.0, 1.0, 1.0], 0.5, 0))], [target])
    assert report.num_matches == 0
    assert harmony_report([], []).num_matches == 0


def test_report_file(tmp_path: Path) -> None:
    report = HarmonyReport(np.array([0.25, 0.5]), np.array([0.5, 1.0]), bins=7)
    report.save(tmp_path / "report.npz")
    again = HarmonyReport.load(tmp_path / "report.npz")
    assert again.as_dict() == report.as_dict() and again.bins == 7


def _scored(scores: list[float], shift: float = 0.0) -> HarmonyReport:
    """A report of as many detections, of which every second has a ground truth under it."""
    places = [[12.0 * i + shift, 0.0, 12.0 * i + 10 + shift, 10.0] for i in range(len(scores))]
    labels = torch.ones(len(scores), dtype=torch.int64)
    truth = torch.tensor([[12.0 * i, 0.0, 12.0 * i + 10, 10.0] for i in range(0, 6, 2)])
    target = {"boxes": truth, "labels": torch.ones(3, dtype=torch.int64)}
    found = {"boxes": torch.tensor(places), "scores": torch.tensor(scores), "labels": labels}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    empty = {**nothing, "scores": torch.zeros(0)}
    return harmony_report([empty, found], [nothing, target])


def test_scores_against_the_float_model(tmp_path: Path) -> None:
    """By hand: the pairs, the threshold that is best for the float model, F1 of both there."""
    reference = _scored([0.9, 0.8, 0.7, 0.2, 0.4, 0.01])
    # Of 3 objects: 1, 1, 2, 2, 3, 3 hits among the detections by score, so 3 of 4 at 0.4.
    model = _scored([0.8, 0.9, 0.5, 0.1, 0.3, 0.5], shift=1.0)
    found = model.fidelity(reference)
    assert found.pairs == 5  # the one of 0.01 is not followed
    assert found.shift == pytest.approx((-0.1 + 0.1 - 0.2 - 0.1 - 0.1) / 5, abs=1e-7)
    assert found.threshold == pytest.approx(0.4) and found.float_f1 == pytest.approx(6 / 7)
    assert found.f1 == pytest.approx(2 * 2 / (4 + 3))
    same = reference.fidelity(reference)
    assert same.shift == 0 and same.f1 == same.float_f1
    model.save(tmp_path / "model.npz")
    assert HarmonyReport.load(tmp_path / "model.npz").fidelity(reference) == found


def test_the_threshold_lets_all_of_a_score_through() -> None:
    reference = _scored([0.5, 0.5, 0.5, 0.5, 0.5])
    found = reference.fidelity(reference)
    assert found.threshold == 0.5 and found.f1 == pytest.approx(2 * 3 / (5 + 3))


def test_scores_that_cannot_be_compared() -> None:
    report = _scored([0.9, 0.8])
    bare = HarmonyReport(np.array([0.5]), np.array([0.5]))
    for one, other in ((report, bare), (bare, report)):
        with pytest.raises(ValueError, match="reference: expected reports with detections"):
            one.fidelity(other)
    with pytest.raises(ValueError, match="reference: expected the same images"):
        report.fidelity(harmony_report([], []))
    nothing = harmony_report([], [])
    found = nothing.fidelity(nothing)
    assert np.isnan([found.shift, found.threshold]).all() and found.f1 == found.float_f1 == 0


def test_report_bad_input() -> None:
    with pytest.raises(ValueError, match="expected as many, got 0 and 1"):
        harmony_report([], [{}])
    with pytest.raises(ValueError, match=r"min_iou: expected a value in \[0, 1\], got 2"):
        harmony_report([], [], min_iou=2)


def test_detection_is_imported_lazily() -> None:
    code = """
import sys
import hqod_ops, hqod_ops.detection
heavy = {"matplotlib", "pycocotools", "sklearn", "torchvision", "PIL", "scipy"}
before = heavy & set(sys.modules)
assert "open_dataset" in dir(hqod_ops.detection)
hqod_ops.detection.open_dataset, hqod_ops.detection.evaluate_coco
hqod_ops.detection.harmony_report, hqod_ops.detection.plot_harmony
assert not before and not heavy & set(sys.modules), sys.modules.keys() & heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name() -> None:
    import hqod_ops.detection

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hqod_ops.detection.nothing  # noqa: B018
