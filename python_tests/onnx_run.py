"""Running an exported file, as a user does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor


def run(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    """The outputs of a file by ONNX Runtime on the CPU, with its defaults."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return session.run(None, feeds)
