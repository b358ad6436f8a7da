"""What a file is written for: a runtime with what it is fast on, one row each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """How a file is written.

    Attributes:
        name (str): of the target.
        runtime (str): what checks the file, ``"onnxruntime"`` or ``"openvino"``.
        least_bits (int): of the integer types in which the file computes.
        fold_affine (bool): batch norms go into scales and biases.
        limit_codes (bool): codes are limited as integers, where the type is wider than they.
        spread_weights (bool): codes of weights of fewer than 8 bits are multiplied by a power of
            two, and their scale divided: the runtime rounds biases to multiples of the product of
            the scales of input and weight, which is coarse at few bits.
        unsigned_activations (bool): activations have unsigned types.
        symmetric (bool): the runtime knows signed types with the zero point 0 alone.
    """

    name: str
    runtime: str = "onnxruntime"
    least_bits: int = 8
    fold_affine: bool = True
    limit_codes: bool = True
    spread_weights: bool = False
    unsigned_activations: bool = False
    symmetric: bool = False


TARGETS = {
    target.name: target
    for target in (
        Target("onnxruntime", spread_weights=True, unsigned_activations=True),
        Target("openvino", runtime="openvino", unsigned_activations=True),
        Target("tensorrt", limit_codes=False, symmetric=True),
        Target(
            "smallest",
            least_bits=1,
            fold_affine=False,
            limit_codes=False,
            unsigned_activations=True,
        ),
    )
}
"""By name."""

DEFAULT = "onnxruntime"
"""Its files are the fast ones in ONNX Runtime, and run in the others."""


def find_target(name: str) -> Target:
    """The target of a name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]
