"""What a run leaves in its directory, and how it is read again."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from hqod_ops.detection.models.options import WholeNumber
from hqod_ops.training import ConfigError
from hqod_ops.training.reading import current, from_dict, read, to_dict

CONFIG = "config.json"
LOG = "log.jsonl"
CHECKPOINT = "last.pt"
HARMONY = "harmony.npz"
RESULT = "result.json"
FORMAT = 1
"""Of the checkpoints."""

_Side = Annotated[int, Meta(ge=1, le=2**16)]


@dataclass
class _Average:
    """The part of a moving average."""

    model: dict[str, Tensor]
    steps: WholeNumber


@dataclass
class _Checkpoint:
    """What a checkpoint holds at least; anybody may have written the file."""

    format: Literal[1]
    config: dict[str, Any]
    categories: Annotated[list[str], Meta(min_length=1)]
    epoch: WholeNumber
    history: list[dict[str, Any]]
    model: dict[str, Tensor]
    image: tuple[_Side, _Side] | None = None
    average: _Average | None = None


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is either whole or, after a crash or on a full disk, as it was before.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    part = path.with_suffix(".tmp")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the new name must not reach the disk before the content
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        error.filename = str(path)  # a failed write names no file
        raise


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """The directory of a run for this process alone, until it ends or is killed.

    Where the file system knows no locks, nothing is locked.

    Raises:
        ConfigError: another process has it.
    """
    held = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise ConfigError(f"{directory}: another process is training this run") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(held)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Plain data as a file that a person can read, by :func:`write_whole`."""
    write_whole(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint written by :class:`hqod_ops.training.trainer.Trainer`.

    Args:
        path (str or Path): the file, or the directory of a run.

    Raises:
        ConfigError: there is none, or it is not a checkpoint of a run.
    """
    path = Path(path)
    path = path / CHECKPOINT if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"{path}: expected a checkpoint, found no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: not a readable checkpoint: {first}") from None
    try:
        msgspec.convert(state, _Checkpoint)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: expected a checkpoint written by hqod train: {error}") from None
    return {**state, "config": current(state["config"])}


def trained_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a run gives: the weights of a checkpoint, or the average of them where it has one.

    Args:
        state (mapping): what :func:`read_checkpoint` gives.
    """
    weights: dict[str, Tensor] = (state.get("average") or state)["model"]
    return weights


def is_finished(directory: Path) -> bool:
    """Whether a run has its result."""
    return (directory / RESULT).is_file()


def saved_settings(directory: Path) -> dict[str, Any]:
    """The settings of a run that was started, as plain data.

    They are those of its checkpoint, or of its ``config.json`` if it was stopped before the first.

    Raises:
        ConfigError: no run was started there, or its file is broken.
    """
    if (directory / CHECKPOINT).is_file():
        return dict(read_checkpoint(directory)["config"])
    if (directory / CONFIG).is_file():
        return read(directory / CONFIG)
    raise ConfigError(
        f"{directory}: expected a run to resume, found neither {CHECKPOINT} nor {CONFIG}"
    )


def saved_shape(path: str | Path) -> tuple[int, int] | None:
    """Height and width of the typical image of a checkpoint; None where it does not say them."""
    state = read_checkpoint(path)
    if state.get("image"):
        height, width = state["image"]
        return height, width
    size = from_dict(state["config"]).data.size  # of earlier versions: the settings alone say it
    return (size, size) if isinstance(size, int) and size > 0 else None


def read_result(directory: str | Path) -> dict[str, Any]:
    """The result of a finished run, with its settings under ``"config"``.

    Args:
        directory (str or Path): directory of the run.

    Raises:
        ConfigError: it holds no finished run.
    """
    directory = Path(directory)
    try:
        result = json.loads((directory / RESULT).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: expected the directory of a finished run ({error.strerror})"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{directory}: broken result: {error}") from None
    return {**result, "config": to_dict(from_dict(read(directory / CONFIG)))}
