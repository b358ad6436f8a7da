"""The quantizers of a model: found once, then handed through the export."""

from __future__ import annotations

from collections import Counter

from torch import nn

from hqod_ops.quant.nn.layers import QATLayer
from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.quant.quantizers.calls import reset_levels


class Inventory:
    """The quantizers of a model that are on, and which call of them comes next.

    Args:
        model (nn.Module): from :func:`hqod_ops.quant.prepare_qat`.

    Attributes:
        model (nn.Module): the model.
        layers (list of QATLayer): all its layers.
        activations (dict of str to Quantizer): the quantizers that are not of weights, by name.
        weights (dict of str to (QATLayer, Quantizer)): those of weights with their layers, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        layers = {name: m for name, m in modules.items() if isinstance(m, QATLayer)}
        of_weights = {layer.weight_quantizer for layer in layers.values()}
        self.model = model
        self.layers = list(layers.values())
        self.activations = {
            name: m
            for name, m in modules.items()
            if isinstance(m, Quantizer) and m not in of_weights and m.enabled and not m.left_out
        }
        self.weights = {
            f"{name}.weight_quantizer".lstrip("."): (layer, quantizer)
            for name, layer in layers.items()
            if (quantizer := layer.weight_quantizer) is not None
            and quantizer.enabled
            and not quantizer.left_out
        }
        self._calls: Counter[str] = Counter()

    def verify(self) -> None:
        """Check that there are quantizers, and that all are calibrated.

        Raises:
            ValueError: that is not so.
        """
        if not any(isinstance(module, Quantizer) for module in self.model.modules()):
            raise ValueError("model: expected a model from prepare_qat, it has no quantizer")
        weights = {name: quantizer for name, (_, quantizer) in self.weights.items()}
        found = {**self.activations, **weights}.items()
        missing = [name for name, quantizer in found if not quantizer.calibrated]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"model: expected a calibrated model, {', '.join(missing[:3])}{more} never were; "
                "run hqod_ops.quant.calibrate(model, batches) or load a calibrated state_dict"
            )

    def begin(self) -> None:
        """The next calls are the first of a forward pass."""
        self._calls.clear()
        reset_levels(self.model)

    def next_call(self, name: str) -> tuple[str, int]:
        """The name of an activation quantizer's next call, and its level.

        The name is the quantizer's own where it has one level, and is called once.
        """
        call, levels = self._calls[name], self.activations[name].levels
        self._calls[name] += 1
        return (name if levels == 1 and call == 0 else f"{name}.{call}"), call if levels > 1 else 0
