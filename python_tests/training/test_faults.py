"""What goes wrong around a run: a killed process, a full disk, a loader's process that dies.

Nothing is lost but the steps since the last checkpoint, and the resumed run has the same bits.
"""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("pycocotools")

from hqod_ops.cli import BAD_INPUT, FAILED, main
from hqod_ops.training import WorkerError
from hqod_ops.training.data import workers_watched
from hqod_ops.training.files import read_checkpoint, write_whole
from hqod_ops.training.trainer import Trainer

OPTIONS = [
    *("--set", "data.size=64", "--set", "data.train_images=8", "--set", "data.test_images=3"),
    *("--set", "data.calibration_images=4", "--set", "model.stem=8", "--batch-size", "4"),
    *("--set", "model.widths=[8, 8, 16]", "--set", "model.channels=8"),
    *("--set", "model.head_depth=1", "--epochs", "3", "--bits", "4"),
    *("--device", "cpu", "--threads", "1", "--quiet"),
]
STEPS = 2
"""In an epoch of such a run."""

KILLED = """
import os, signal, sys
from hqod_ops.training import files, trainer
from hqod_ops.cli import main
where, left = sys.argv[1], int(sys.argv[2])

def after(function):
    def call(*args):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call

if where == "step":
    trainer.Trainer.step = after(trainer.Trainer.step)
else:  # the new checkpoint is written, and not yet in its place
    os.replace = after(os.replace)
main(sys.argv[3:])
"""


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def command(runs: Path, name: str, *options: str) -> list[str]:
    return ["train", "--runs", str(runs), "--name", name, *OPTIONS, *options]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of a run that nothing happens to."""
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("whole")
    assert main(command(runs, "run")) == 0
    return read_checkpoint(runs / "run")


def same(state: dict[str, Any], other: dict[str, Any]) -> bool:
    """Weights, optimizer and random state to the bit."""
    keys = ("model", "optimizer", "scheduler", "rng", "epoch")
    one, two = (
        json.dumps([each[key] for key in keys], default=Tensor.tolist) for each in (state, other)
    )
    return one == two


def resumed(runs: Path, name: str, whole: dict[str, Any], *options: str) -> bool:
    assert main(command(runs, name, "--resume", *options)) == 0
    return same(read_checkpoint(runs / name), whole)


ALWAYS = ("--set", "engine.checkpoint_minutes=1e-9")
"""A checkpoint after every step."""


@pytest.mark.parametrize(
    ("where", "count", "epochs", "steps", "options"),
    [
        ("step", STEPS + 2, 1, 0, ()),
        ("step", STEPS + 2, 1, 1, ALWAYS),
        # config; checkpoint and log at first and after an epoch; checkpoint
        ("replace", 6, 1, 0, ()),
    ],
)
def test_killed(
    tmp_path: Path,
    whole: dict[str, Any],
    where: str,
    count: int,
    epochs: int,
    steps: int,
    options: tuple[str, ...],
) -> None:
    arguments = [sys.executable, "-c", KILLED, where, str(count)]
    arguments += command(tmp_path, "run", *options)
    done = subprocess.run(arguments, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    state = read_checkpoint(tmp_path / "run")
    assert (state["epoch"], state["step"]) == (epochs, steps)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(lines) == epochs
    assert resumed(tmp_path, "run", whole)
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_terminated(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, Any],
) -> None:
    original, steps = Trainer.step, []

    def step(trainer: Trainer, *args: Any) -> dict[str, float]:
        steps.append(1)
        if len(steps) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        assert main(command(tmp_path, "run")) == 128 + signal.SIGTERM
    error = capsys.readouterr().err
    assert "SIGTERM in epoch 1, step 1; saved" in error and "train --resume" in error
    assert read_checkpoint(tmp_path / "run")["step"] == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert resumed(tmp_path, "run", whole)


class _Full(io.FileIO):
    """A file on a disk that has no room for more than a kilobyte."""

    def write(self, content: Any) -> int:
        if self.tell() + len(content) > 1000:
            super().write(bytes(content)[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
        return super().write(content)


def test_full_disk(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, Any],
) -> None:
    original = Trainer.save

    def save(trainer: Trainer) -> None:
        if trainer.epoch < 2:
            return original(trainer)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda path, mode: _Full(path, mode))
            original(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save)
        assert main(command(tmp_path, "run")) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device" in error
    assert "to continue: hqod train --resume" in error
    directory = tmp_path / "run"
    assert read_checkpoint(directory)["epoch"] == 1
    assert len((directory / "log.jsonl").read_text().splitlines()) == 1
    assert {path.name for path in directory.iterdir()} == {"config.json", "last.pt", "log.jsonl"}
    assert resumed(tmp_path, "run", whole)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX's limits")
def test_real_limit_of_the_file_system(tmp_path: Path) -> None:
    """What the system refuses to write, and not only a stand-in for it."""
    code = f"""
import pathlib, resource, signal
from hqod_ops.training.files import write_whole
path = pathlib.Path({str(tmp_path / "last.pt")!r})
write_whole(path, b"before")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_whole(path, bytes(5000))
except OSError as error:
    name = pathlib.Path(error.filename).name
    print(error.errno, name, path.read_bytes(), [p.name for p in path.parent.iterdir()])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{errno.EFBIG} last.pt b'before' ['last.pt']\n"


def test_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"one", memoryview(b"two")):
        write_whole(path, content)
        assert path.read_bytes() == bytes(content)
    with pytest.raises(OSError, match="a.json"):
        write_whole(tmp_path / "missing" / "a.json", b"")


def test_a_loader_s_process_dies(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, Any],
) -> None:
    original, steps = Trainer.step, []

    def step(trainer: Trainer, *args: Any) -> dict[str, float]:
        steps.append(1)
        if len(steps) == STEPS + 1:
            for child in multiprocessing.active_children():
                if child.pid is not None:
                    os.kill(child.pid, signal.SIGKILL)
        return original(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        assert main(command(tmp_path, "run", "--set", "data.workers=1")) == FAILED
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a process that loads images died" in error
    assert "fewer data.workers" in error and "to continue: hqod train --resume" in error
    assert read_checkpoint(tmp_path / "run")["epoch"] == 1
    assert issubclass(WorkerError, RuntimeError)
    # The number of workers changes no bit, but is a setting of the run.
    assert resumed(tmp_path, "run", whole, "--set", "data.workers=1")


@pytest.mark.parametrize(
    ("error", "is_of_a_process"),
    [
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), True),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), True),
        (EOFError(), True),
        (RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.png"), False),
        (EOFError("no more images in GIF file"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("shapes do not fit"), False),
    ],
    ids=repr,
)
def test_a_process_that_dies_while_it_hands_a_batch_over(
    error: Exception, is_of_a_process: bool
) -> None:
    """Its end of the connection goes, which shows before or after torch sees that it died."""
    expected = WorkerError if is_of_a_process else type(error)
    with pytest.raises(expected) as raised, workers_watched():
        raise error
    assert is_of_a_process == ("a process that loads images died" in str(raised.value))
