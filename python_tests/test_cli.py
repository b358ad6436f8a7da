"""The hqod command: what it prints, where it leaves things, and one line for every mistake."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("pycocotools")

import hqod_ops
from hqod_ops.cli import BAD_INPUT, FAILED, INTERRUPTED, _parser, main
from hqod_ops.cli.overview import TASKS
from hqod_ops.detection.data import DigitScenes, write_coco
from hqod_ops.training import ConfigError
from hqod_ops.training.files import locked, read_checkpoint
from hqod_ops.training.trainer import Trainer

TINY = [
    *("--set", "data.size=64"),
    *("--set", "data.train_images=8"),
    *("--set", "data.test_images=3"),
    *("--set", "model.stem=8"),
    *("--set", "model.widths=[8, 8, 16]"),
    *("--set", "model.channels=8"),
    *("--set", "model.head_depth=1"),
    *("--batch-size", "4"),
    *("--epochs", "2"),
    *("--device", "cpu"),
    *("--threads", "1"),
]


def _train(runs: Path, *options: str) -> int:
    return main(["train", "--data", "digits", "--runs", str(runs), *TINY, *options])


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith("\n") and error.startswith("hqod: "), error
    return error


def test_train_quantize_evaluate_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(tmp_path, "--name", "fp32", "--seed", "3") == 0
    init = ["--init", str(tmp_path / "fp32" / "last.pt"), "--bits", "2"]
    assert _train(tmp_path, "--name", "w2", *init) == 0
    assert _train(tmp_path, "--name", "w2-hqod", *init, "--hqod") == 0
    printed = capsys.readouterr().out
    assert (
        "| FP32 |" in printed and "| 2-bit LSQ |" in printed and "| 2-bit LSQ + HQOD |" in printed
    )
    settings = json.loads((tmp_path / "w2-hqod" / "config.json").read_text())
    assert settings["quant"]["weight_bits"] == settings["quant"]["act_bits"] == 2
    assert settings["loss"]["hqod"] is True
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["seed"] == 3

    assert main(["eval", str(tmp_path / "w2"), "--quiet"]) == 0
    lines = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    result = json.loads((tmp_path / "w2" / "result.json").read_text())
    assert float(lines["AP"]) == pytest.approx(100 * result["AP"], abs=0.06)
    assert [line for line in lines if line.startswith("AP of ")][::9] == ["AP of 0", "AP of 9"]
    assert main(["eval", str(tmp_path / "w2"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["AP"] == pytest.approx(result["AP"], abs=1e-6) and "AP/9" in data

    out = tmp_path / "out"
    assert main(["report", str(tmp_path), "--output", str(out)]) == 0
    table = (out / "report.md").read_text()
    assert capsys.readouterr().out.startswith(table)
    for name in ("harmony.png", "detections.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    rows = json.loads((out / "report.json").read_text())
    assert [row["label"] for row in rows] == ["FP32", "2-bit LSQ", "2-bit LSQ + HQOD"]


def test_data_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "coco"
    for split, images in (("train", 8), ("val", 3)):
        write_coco(DigitScenes(split, num_images=images, size=64), data, split)
    runs, out = tmp_path / "runs", tmp_path / "out"
    assert _train(runs, "--data", str(data), "--name", "fp32") == 0
    assert _train(runs, "--data", str(data), "--name", "fp32-more", "--seed", "1") == 0
    assert main(["report", str(runs), "--output", str(out)]) == 0
    assert "| FP32 |" in capsys.readouterr().out
    assert (out / "detections.png").read_bytes().startswith(b"\x89PNG")
    # The images may be gone when somebody looks at the runs again.
    data.rename(tmp_path / "elsewhere")
    again = tmp_path / "again"
    assert main(["report", str(runs), "--output", str(again)]) == BAD_INPUT
    assert f"{data}: no such folder" in _one_line(capsys)
    assert {path.name for path in again.iterdir()} == {"harmony.png", "report.json", "report.md"}
    # A run goes on with them where they are now, but not with others.
    resume = ["--resume", "--name", "fp32", "--data"]
    assert _train(runs, *resume, str(tmp_path / "elsewhere")) == 0
    for split, images in (("train", 9), ("val", 3)):
        write_coco(DigitScenes(split, num_images=images, size=64), tmp_path / "other", split)
    capsys.readouterr()
    assert _train(runs, *resume, str(tmp_path / "other")) == BAD_INPUT
    assert "data.source: expected the 8 training images" in _one_line(capsys)
    assert _train(runs, *resume, "digits") == BAD_INPUT
    assert "cannot resume: data.source was" in _one_line(capsys)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["hqod_ops"] == hqod_ops.__version__ and printed["torch"] == torch.__version__
    assert "torchvision" in printed
    assert printed["cuda"].startswith("no: ") != torch.cuda.is_available()


def test_interrupt_and_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Trainer.step, []

    def step(trainer: Trainer, *args: object) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(trainer, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "step", step)
    assert _train(tmp_path, "--name", "run") == INTERRUPTED
    line = _one_line(capsys)
    assert "interrupted (SIGINT in epoch 2, step 1; saved)" in line
    command = line.split("to continue: hqod ")[1].split()
    state = read_checkpoint(tmp_path / "run")
    assert (state["epoch"], state["step"]) == (1, 1)
    assert main(command) == 0
    assert read_checkpoint(tmp_path / "run")["epoch"] == 2 and len(calls) == 3 + 1


def test_resume_of_a_run_stopped_before_its_first_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings are not lost, whether its name is an option or a setting."""

    def stopped(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hqod_ops.training.build.calibrate", stopped)
        options = ["--set", "name=early run", "--bits", "4", "--hqod", "--seed", "7"]
        assert _train(tmp_path, *options) == INTERRUPTED
    command = shlex.split(_one_line(capsys).split("to continue: hqod ")[1])
    assert not (tmp_path / "early run" / "last.pt").exists()
    assert main([*command, "--epochs", "3"]) == BAD_INPUT
    assert "cannot resume: schedule.epochs was 2 and is now 3" in _one_line(capsys)
    assert main(command) == 0
    settings = read_checkpoint(tmp_path / "early run")["config"]
    assert settings["quant"]["act_bits"] == 4 and settings["loss"]["hqod"] and settings["seed"] == 7
    assert settings["data"]["train_images"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "typo"], "typo: expected a run to resume, found neither last.pt nor"),
        ([], "--resume: expected --name of the run to resume"),
    ],
)
def test_nothing_to_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert _train(tmp_path, "--resume", *options) == BAD_INPUT
    assert message in _one_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--init", "nowhere.pt"], "nowhere.pt: expected a checkpoint, found no such file"),
        (["--recipe", "nowhere.toml"], "nowhere.toml: cannot read the configuration"),
        (["--bits", "1"], "quant.weight_bits: expected a value in [2, 8], or 32 for not"),
        (["--set", "data.size=7"], "data.size: expected a value in [64, 1024], got 7"),
        (["--set", "model.groups=3"], "model.groups: expected a divisor of 8 channels, got 3"),
        (["--set", "data.colour=1"], "data.colour: no such setting"),
        (["--set", "data.test_split=evening"], "data.test_split: expected one of 'train'"),
        (["--set", "data.train_images=3000000000"], "data.train_images: expected a value in [1"),
        (
            ["--device", "toaster"],
            "device: cannot use 'toaster': expected a device of torch, such as",
        ),
        (["--device", "meta"], "device: cannot use 'meta'"),
        (["--lr", "nan"], "schedule.lr: expected float >= 0.0, got nan"),
        (["--seed", "99999999999999999999"], "seed: expected int <= 4294967295, got 99"),
        (["--set", "data.workers=-1"], "data.workers: expected int >= 0, got -1"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert _train(tmp_path, "--name", "run", *options) == BAD_INPUT
    assert message in _one_line(capsys)


def test_broken_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("seed = = 1")
    assert _train(tmp_path, "--recipe", str(broken)) == BAD_INPUT
    assert "broken.toml: " in _one_line(capsys)
    checkpoint = tmp_path / "broken.pt"
    checkpoint.write_bytes(b"not a checkpoint")
    assert main(["eval", str(checkpoint)]) == BAD_INPUT
    assert "broken.pt: not a readable checkpoint" in _one_line(capsys)
    assert main(["report", str(tmp_path)]) == BAD_INPUT
    assert "expected a finished run there or below, found none" in _one_line(capsys)
    annotations = tmp_path / "coco" / "annotations"
    annotations.mkdir(parents=True)
    (tmp_path / "coco" / "train").mkdir()
    (annotations / "instances_train.json").write_text('{"images": [')
    assert _train(tmp_path, "--data", str(tmp_path / "coco")) == BAD_INPUT
    assert "instances_train.json: cannot be read as JSON" in _one_line(capsys)


def test_diverged_training_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lr", "1e30", "--set", "schedule.optimizer=sgd", "--set", "schedule.clip=0"]
    assert _train(tmp_path, "--name", "run", *options) == FAILED
    assert "the loss is not finite in epoch 1" in _one_line(capsys)


@pytest.mark.require("onnx", "onnxruntime", "onnxscript")
def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(tmp_path, "--name", "fp32") == 0
    init = ["--init", str(tmp_path / "fp32" / "last.pt"), "--bits", "4"]
    assert _train(tmp_path, "--name", "w4", *init) == 0
    capsys.readouterr()
    file = tmp_path / "out" / "w4.onnx"
    assert main(["export", str(tmp_path / "w4"), "--out", str(file)]) == 0
    assert str(file) in capsys.readouterr().out and file.stat().st_size > 0
    import onnx

    assert main(["export", str(tmp_path / "w4"), "--out", str(file), "--nms", "--opset=18"]) == 0
    assert "opset 18" in capsys.readouterr().out
    assert onnx.load(file).graph.output[0].name == "detected_boxes"
    for option, message in (("--opset=17", "opset: expected at least 18"), ("--nms", "--nms: ex")):
        command = ["export", str(tmp_path / "w4"), "--out", str(file), "--outputs=raw", option]
        assert main(command) == BAD_INPUT
        assert message in _one_line(capsys)
    assert main(["export", str(tmp_path / "fp32"), "--out", str(file)]) == BAD_INPUT
    assert "expected a quantized run, got one in float" in _one_line(capsys)


def test_run_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hqod_ops.cli", "train", "--data", "/no/such/folder"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == BAD_INPUT and done.stdout == ""
    assert done.stderr.startswith("hqod: /no/such/folder") and done.stderr.count("\n") == 1


def test_missing_package_names_the_extra() -> None:
    code = "import sys; sys.modules['torchvision'] = None; from hqod_ops.cli import main; "
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(main(['train', '--name', 'x']))"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == BAD_INPUT and done.stderr.count("\n") == 1
    assert "torchvision" in done.stderr and 'pip install "hqod_ops[detection]"' in done.stderr


def test_info_needs_the_core_alone() -> None:
    """Each command imports what it needs: info says what is missing."""
    code = """
import sys
for name in ("tomllib", "tomli", "torchvision", "PIL", "sklearn", "rich", "msgspec",
             "pycocotools", "faster_coco_eval"):
    sys.modules[name] = None
from hqod_ops.cli import main
sys.exit(main(["info"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "torchvision" in done.stdout


def test_nothing_to_do_is_a_question(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: hqod")
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"hqod_ops {hqod_ops.__version__}\n"


def test_help_shows_every_command_with_an_example_that_parses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = _parser()
    (commands,) = (a.choices for a in parser._actions if isinstance(a.choices, dict))
    shown = {name: line for task in TASKS.values() for name, line in task.items()}
    assert shown.keys() == commands.keys()
    assert main([]) == 0
    text = capsys.readouterr().out
    for name, line in shown.items():
        assert line in text and line.startswith(f"hqod {name}")
        assert commands[name].format_help().endswith(f"example: {line}\n")
        parser.parse_args(line.split()[1:])


def test_debug_shows_where(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a checkpoint"):
        main(["--debug", "eval", str(tmp_path / "none.pt")])


def test_one_run_is_trained_by_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        assert _train(tmp_path, "--name", "run") == BAD_INPUT
    assert "another process is training this run" in _one_line(capsys)
    assert not list((tmp_path / "run").iterdir())
    assert _train(tmp_path, "--name", "run") == 0


@pytest.mark.parametrize("name", ["", ".", "../run", "/run", "a/../../run"])
def test_a_name_stays_below(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert _train(tmp_path / "runs", "--name", name) == BAD_INPUT
    assert "name: expected a directory below that of all runs" in _one_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [["fly"], ["train", "--epochs", "0"]])
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == BAD_INPUT
    assert capsys.readouterr().err.startswith("usage: hqod")


def test_settings_are_listed_with_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    """Every setting, those of the quantization included: nothing is without a meaning."""
    assert main(["settings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for expected in ("schedule.lr = 0.004", 'quant.weight_quantizer = "lsq"', "quant.first"):
        assert lines[lines.index(expected) + 1].strip()
    names = [i for i, line in enumerate(lines) if line and line[0] not in " ["]
    assert len(names) > 60 and all(lines[i + 1].startswith("    ") for i in names)


def test_bits_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--bits", "four"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith("argument --bits: expected a number or \"float\", got 'four'")
