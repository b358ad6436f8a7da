"""The edge layers of a model, which get bits of their own: the first and the prediction layers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from hqod_ops.quant.config.qat_config import QATConfig
from hqod_ops.quant.patterns import as_tuple

EDGES = ("first", "prediction")

_RPN = ("rpn.head.cls_logits", "rpn.head.bbox_pred")
_BOXES = ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred")
# Prediction layers of torchvision's detectors, by class name. Of alternatives (after "|"), the
# first that fits: SSD predicts with one convolution a feature map, SSDLite with the second of two.
_TORCHVISION_PREDICTION = {
    "RetinaNet": ("head.classification_head.cls_logits", "head.regression_head.bbox_reg"),
    "FCOS": (
        "head.classification_head.cls_logits",
        "head.regression_head.bbox_reg",
        "head.regression_head.bbox_ctrness",
    ),
    "SSD": tuple(
        f"head.{head}_head.module_list.[0-9]|head.{head}_head.module_list.[0-9].1"
        for head in ("classification", "regression")
    ),
    "FasterRCNN": (*_RPN, *_BOXES),
    "MaskRCNN": (*_RPN, *_BOXES, "roi_heads.mask_predictor.mask_fcn_logits"),
    "KeypointRCNN": (*_RPN, *_BOXES, "roi_heads.keypoint_predictor.kps_score_lowres"),
}


def edge_patterns(
    model: nn.Module, layers: Iterable[str], config: QATConfig
) -> list[tuple[str, str]]:
    """The patterns of the edge layers, those of the configuration or else those of the model.

    Args:
        model (nn.Module): asked for what config does not name.
        layers (iterable of str): names of the layers that can be quantized, in order.
        config (QATConfig): its first, prediction and bits.

    Returns:
        list of (str, str): argument and pattern.

    Raises:
        ValueError: the edge layers are not known.
    """
    if (config.edge("weight"), config.edge("act")) == (config.weight_bits, config.act_bits):
        known: dict[str, tuple[str, ...]] = {edge: () for edge in EDGES}
    else:
        known = known_edges(model, list(layers))
    edges: list[tuple[str, str]] = []
    for argument in EDGES:
        patterns = getattr(config, argument)
        if patterns is None:
            patterns = known.get(argument)
        if patterns is None:
            raise ValueError(
                f"{argument}: the layers with {config.edge_bits} bits are not known for a "
                f"{type(model).__name__}; name them, or give () for none"
            )
        edges += [(argument, pattern) for pattern in patterns]
    return edges


def known_edges(model: nn.Module, layers: list[str]) -> dict[str, tuple[str, ...]]:
    """The edge layers that a model or a part of it declares, or those of torchvision's detectors.

    A part is asked only where no module around it has answered.

    Args:
        model (nn.Module): declares them by the attributes ``qat_first`` and ``qat_prediction``.
        layers (list of str): names of the layers that can be quantized, in order.

    Returns:
        dict of str to tuple of str: patterns by argument; what is not known is missing.
    """
    known: dict[str, tuple[str, ...]] = {}
    for edge in EDGES:
        answered: list[str] = []
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            if any(prefix.startswith(outer) for outer in answered):
                continue
            patterns = _declared(module, edge)
            if patterns is None:
                patterns = _torchvision(module, edge, prefix, layers)
            if patterns is not None:
                answered.append(prefix)
                known[edge] = (*known.get(edge, ()), *(prefix + pattern for pattern in patterns))
    return known


def _declared(module: nn.Module, edge: str) -> tuple[str, ...] | None:
    patterns = getattr(module, f"qat_{edge}", None)
    return None if patterns is None else as_tuple(patterns)


def _torchvision(
    module: nn.Module, edge: str, prefix: str, layers: list[str]
) -> tuple[str, ...] | None:
    """What is known of torchvision's detectors; their first layer is the first one registered."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torchvision.") and kind.__name__ in _TORCHVISION_PREDICTION:
            inside = [name.removeprefix(prefix) for name in layers if name.startswith(prefix)]
            if edge == "first":
                return tuple(inside[:1])
            return tuple(
                _first_that_fits(patterns.split("|"), inside)
                for patterns in _TORCHVISION_PREDICTION[kind.__name__]
            )
    return None


def _first_that_fits(patterns: list[str], layers: list[str]) -> str:
    fitting = [p for p in patterns if any(fnmatchcase(name, p) for name in layers)]
    return (fitting or patterns)[0]


def no_such_layer(argument: str, pattern: str, layers: Iterable[str]) -> str:
    """The error for a pattern that fits no layer, with the closest names."""
    inside = [name for name in layers if name.startswith(f"{pattern}.")]
    if inside:
        hint = f"it names a container: did you mean {pattern + '.*'!r}?"
    else:
        close = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.0)
        hint = f"the closest are {', '.join(map(repr, close))}" if close else "the model has none"
    return f"{argument}: no convolution or linear layer fits the pattern {pattern!r}; {hint}"
