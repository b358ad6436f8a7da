"""The demonstration from end to end, and the tables made of its runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("pycocotools")
pytest.importorskip("matplotlib")

from hqod_ops.cli import main
from hqod_ops.detection.harmony import HarmonyReport, harmony_report
from hqod_ops.quant.config import FLOAT_BITS, QATConfig, Rule
from hqod_ops.training import ConfigError
from hqod_ops.training.demo import LENGTHS, demo_configs
from hqod_ops.training.files import CONFIG, HARMONY, RESULT, write_json
from hqod_ops.training.reading import to_dict
from hqod_ops.training.report import (
    COLUMNS,
    FIDELITY,
    aggregate,
    find_runs,
    label,
    markdown,
    read_results,
)
from hqod_ops.training.settings import DataConfig, LossConfig, RunConfig
from hqod_ops.training.trainer import Trainer

LABELS = ["FP32", "4-bit LSQ", "4-bit LSQ + HQOD", "2-bit LSQ", "2-bit LSQ + HQOD"]


def test_quick_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["demo", "--quick", "--runs", str(tmp_path), "--threads", "1", "--quiet"]
    assert main(argv) == 0
    first = capsys.readouterr().out
    directory = tmp_path / "demo-quick"
    for name in ("harmony.png", "detections.png"):
        assert (directory / name).read_bytes().startswith(b"\x89PNG")
    table = (directory / "report.md").read_text()
    assert table in first
    assert [line.split(" | ")[0][2:] for line in table.splitlines()[2:]] == LABELS
    assert " score shift | F1 at the float run's threshold |" in table.splitlines()[0]
    for config in demo_configs(LENGTHS["quick"], 0, "demo-quick/seed0", tmp_path):
        log = (tmp_path / config.name / "log.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in log]
        assert len(losses) == config.schedule.epochs and losses[-1] <= losses[0]

    # What is finished is not trained again.
    monkeypatch.setattr(Trainer, "step", None)
    assert main(argv) == 0
    assert table in capsys.readouterr().out


def test_a_pair_differs_in_its_loss_alone() -> None:
    configs = [to_dict(c) for c in demo_configs(LENGTHS["standard"], 5, "demo", Path("runs"))]
    assert [label(c) for c in configs] == LABELS
    for plain, hqod in (configs[1:3], configs[3:5]):
        assert plain["init"] == hqod["init"] == "runs/demo/fp32/last.pt"
        differ = {k for k in plain if plain[k] != hqod[k]}
        assert differ == {"name", "loss"}
        assert {**plain["loss"], "hqod": True} == hqod["loss"]
    assert all(c["seed"] == 5 and c["data"] == configs[0]["data"] for c in configs)


def _result(ap: float | None, **changes: object) -> dict[str, object]:
    metrics = dict.fromkeys(COLUMNS, 0.5)
    return {**metrics, "AP": ap, "config": to_dict(RunConfig(**changes))}  # type: ignore[arg-type]


def test_aggregate_over_seeds() -> None:
    quant = QATConfig(2, 2)
    results = [
        _result(0.50, seed=0, name="a/w2", init="a"),
        _result(0.30, seed=0, quant=quant),
        _result(0.54, seed=1, name="b/w2", init="b"),
        _result(0.40, seed=0, quant=quant, loss=LossConfig(hqod=True)),
    ]
    rows = aggregate(results)
    assert [row["label"] for row in rows] == ["FP32", "2-bit LSQ", "2-bit LSQ + HQOD"]
    assert [row["seeds"] for row in rows] == [[0, 1], [0], [0]]
    assert rows[0]["AP"]["mean"] == pytest.approx(0.52)
    assert rows[0]["AP"]["std"] == pytest.approx(0.02 * 2**0.5)
    assert rows[1]["AP"]["std"] is None
    lines = markdown(rows).splitlines()
    assert lines[2].startswith("| FP32 | 52.0 ± 2.8 | 50.0 ± 0.0 |") and lines[2].endswith("| 2 |")
    assert lines[3].startswith("| 2-bit LSQ | 30.0 | 50.0 |")


def test_a_missing_metric_is_a_dash() -> None:
    assert "| FP32 | - | 50.0 |" in markdown(aggregate([_result(None)]))


def _run(folder: Path, config: RunConfig, scores: list[float], objects: int = 2) -> Path:
    """A finished run that has detected these objects with these scores."""
    directory = folder / config.name
    directory.mkdir(parents=True)
    write_json(directory / CONFIG, to_dict(config))
    write_json(directory / RESULT, dict.fromkeys(COLUMNS, 0.5))
    boxes = torch.tensor([[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(objects)])
    target = {"boxes": boxes, "labels": torch.ones(objects, dtype=torch.int64)}
    output = {**target, "scores": torch.tensor(scores)}
    harmony_report([output], [target]).save(directory / HARMONY)
    return directory


def test_scores_are_compared_with_the_float_run(tmp_path: Path) -> None:
    """That it started from, or else of its seed; of the same images; else there are no columns."""
    w4 = QATConfig(4, 4)
    floats = [
        _run(tmp_path, RunConfig(name=f"float{seed}", seed=seed), scores)
        for seed, scores in enumerate(([0.5, 0.75], [0.25, 0.75]))
    ]
    init = str(floats[0] / "last.pt")
    started = _run(tmp_path, RunConfig(name="a", seed=1, init=init, quant=w4), [0.5, 0.5])
    other = _run(tmp_path, RunConfig(name="b", seed=1, quant=w4), [0.5, 0.5])
    results = read_results([*floats, started, other])
    assert [result.get("score_shift") for result in results] == [None, None, -0.125, 0.0]
    assert [result.get("f1") for result in results] == [1.0, 1.0, 1.0, 1.0]
    rows = aggregate(results)
    lines = markdown(rows).splitlines()
    assert lines[0].endswith("| score shift | F1 at the float run's threshold | runs |")
    assert lines[2].endswith("| - | 100.0 ± 0.0 | 2 |")
    assert rows[1]["score_shift"]["mean"] == -0.0625

    elsewhere = _run(tmp_path, RunConfig(name="c", init=init, quant=w4), [0.5] * 3, objects=3)
    for alone in ([started, other], floats, [*floats, elsewhere]):
        found = aggregate(read_results(alone))
        assert not any(column in row for row in found for column in FIDELITY)
    HarmonyReport(np.zeros(0), np.zeros(0)).save(started / HARMONY)  # of an earlier version
    (other / HARMONY).unlink()
    assert "score shift" not in markdown(aggregate(read_results([*floats, started, other])))


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a finished run there or below, found none"):
        find_runs([tmp_path])


def test_rows_of_the_same_label_name_their_runs() -> None:
    """Two data sets are two rows, which would both read FP32."""
    runs = [
        {**dict.fromkeys(COLUMNS, 0.5), "config": to_dict(config)}
        for config in (
            RunConfig(name="cats"),
            RunConfig(name="dogs-0", data=DataConfig(source="dogs")),
            RunConfig(name="dogs-1", data=DataConfig(source="dogs"), seed=1),
            RunConfig(name="w4", quant=QATConfig(4, 4)),
        )
    ]
    labels = [row["label"] for row in aggregate(runs)]
    assert labels == ["FP32 (cats)", "FP32 (dogs-0, dogs-1)", "4-bit LSQ"]


@pytest.mark.parametrize(
    ("quant", "name"),
    [
        (QATConfig(4, 4, weight_quantizer="tqt", act_quantizer="tqt"), "4-bit TQT"),
        (QATConfig(4, 8, act_quantizer="lsq_plus"), "W4A8 LSQ/LSQ+"),
        (QATConfig(4, FLOAT_BITS), "W4A32 LSQ"),
        (QATConfig(FLOAT_BITS, FLOAT_BITS, overrides=[Rule("a", act_bits=4)]), "mixed bits"),
    ],
)
def test_labels_name_bits_and_quantizers(quant: QATConfig, name: str) -> None:
    assert label(to_dict(RunConfig(quant=quant))) == name
