"""Inputs that were quantized where they were made."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hqod_ops.quant.quantizers.base import Quantizer


def observing(quantizer: Quantizer) -> bool:
    """Whether the quantizer is being calibrated."""
    return quantizer._observers is not None


def tag(quantizer: Quantizer, y: Tensor) -> None:
    """Note on a tensor which quantizer it has passed: see :class:`UpstreamQuantizer`."""
    y._hqod_quantizer = quantizer  # type: ignore[attr-defined]


class UpstreamQuantizer:
    """Stands for the quantizer of a layer's input where that works at the producers.

    The layer takes its input as it is. In calibration, as in an export, it makes sure that this has
    passed the quantizer, which is all that a trace leaves open.

    Args:
        name (str): of the layer.
        quantizer (Quantizer): of its input.
        producers (sequence of str): where it quantizes, for the error.
    """

    def __init__(self, name: str, quantizer: Quantizer, producers: Sequence[str]) -> None:
        self._name, self._quantizer, self._producers = name, quantizer, tuple(producers)

    def __call__(self, x: Tensor) -> Tensor:
        if observing(self._quantizer):
            self.verify(x)
        return x

    def verify(self, x: Tensor) -> None:
        """Check a tensor's tag.

        Raises:
            RuntimeError: it has not passed the quantizer.
        """
        if getattr(x, "_hqod_quantizer", None) is not self._quantizer:
            raise RuntimeError(
                f"{self._name}: expected an input from {' or '.join(self._producers)}, as when the "
                "model was traced, but it comes from elsewhere; replace modules before "
                "place_on_producers, or leave the layer out with "
                f"place_on_producers(model, skip={self._name!r})"
            )
