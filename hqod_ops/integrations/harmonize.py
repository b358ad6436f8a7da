"""harmonize: the terms of HQOD in the training loss of a detector of another library.

Nothing of a library is copied and nothing global is patched. An object of the model that computes
its loss gets a class of two bases: a :class:`Hook` of ours over the class that it had. The hook
calls the library's own method and adds the terms to what that gives; it finds everything on the
object that it is called on. So a deep copy (an EMA), an unpickled model or a replica has hooks of
its own, and giving the object its old class back undoes it all.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from hqod_ops import checks
from hqod_ops.functional import hqod_loss

_Model = TypeVar("_Model", bound=nn.Module)
Places = Iterator[tuple[Any, type["Hook"]]]
"""Objects of a model, each with the hook that it gets."""

KEY = "loss_hqod"
"""The name of the terms where a library keeps its losses by name."""

_LIBRARIES = {
    "torchvision": "hqod_ops.integrations.torchvision_losses",
    "ultralytics": "hqod_ops.integrations.ultralytics",
    "transformers": "hqod_ops.integrations.transformers",
}
"""By top-level package: the module whose ``places(model)`` knows where the losses are."""

_TERMS: dict[str, Callable[..., Tensor]] = {"hqod": hqod_loss}
_NORMALISERS = {"official": 0, "num_pos": 1}


@dataclass(frozen=True)
class Terms:
    """What is added to a loss; the options of :func:`harmonize`."""

    hiou_weight: float = 1.0
    tcorr_weight: float = 1.0
    variant: str = "official"
    normaliser: str = "official"
    terms: str = "hqod"

    def __post_init__(self) -> None:
        checks.number("hiou_weight", self.hiou_weight)
        checks.number("tcorr_weight", self.tcorr_weight)
        checks.choice("variant", self.variant, checks.VARIANTS)
        checks.choice("normaliser", self.normaliser, _NORMALISERS)
        checks.choice("terms", self.terms, dict.fromkeys(_TERMS, 0))

    def __call__(
        self, pred: Tensor, target: Tensor, scores: Tensor, divisor: float | Tensor, *, logits: bool
    ) -> Tensor:
        """The sum over the positives of a batch, divided.

        Args:
            pred (Tensor[P, 4]): decoded boxes (x1, y1, x2, y2), in pixels of the network's input.
            target (Tensor[P, 4]): their objects.
            scores (Tensor[P]): scores of the objects' classes, or their logits.
            divisor (float or Tensor[]): the official one, for that normaliser.
            logits (bool): what scores are.
        """
        if self.normaliser == "num_pos":
            divisor = max(len(pred), 1)
        pred = wide(pred)
        return _TERMS[self.terms](
            pred,
            target.to(pred.dtype),
            scores.to(pred.dtype),
            logits=logits,
            variant=self.variant,
            hiou_weight=self.hiou_weight,
            tcorr_weight=self.tcorr_weight,
            avg_factor=divisor.to(pred.dtype) if isinstance(divisor, Tensor) else divisor,
        )


def wide(x: Tensor) -> Tensor:
    """Half precision in float32: in bfloat16 a pixel coordinate above 256 is off by one or more."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which autocast leaves what is computed from :func:`wide` tensors alone."""
    return torch.autocast(x.device.type, enabled=False)


class Hook:
    """What is put before the class of a library's object, in a class made by :func:`add_hook`.

    Each of its methods without an underscore overrides one of the library's, with the names of its
    parameters; a library in which that is gone or takes other ones is refused. It calls the
    library's own by ``super()``.

    Attributes:
        tested (str): versions of the library that the hook was seen to work with.
    """

    tested: ClassVar[str]
    _hqod_base: ClassVar[type]
    _hqod_hook: ClassVar[type[Hook]]
    _hqod_terms: Terms

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class has no name by which a pickle could find it, so it is made anew from its bases.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        _, (_, *arguments), *state = reduced
        return _new, (*_hooks(type(self)), *arguments), *state


def _new(hooks: tuple[type[Hook], ...], base: type, *arguments: Any) -> Any:
    """An empty object for :mod:`pickle` and :mod:`copy`."""
    kind = _with_hooks(hooks, base)
    return kind.__new__(kind, *arguments)


def _hooks(kind: Any) -> tuple[tuple[type[Hook], ...], type]:
    """The hooks before a library's class, the outermost first, and that class."""
    hooks = []
    while "_hqod_hook" in vars(kind):
        hooks.append(kind._hqod_hook)
        kind = kind._hqod_base
    return tuple(hooks), kind


def _with_hooks(hooks: tuple[type[Hook], ...], base: type) -> type:
    for hook in reversed(hooks):
        base = _hooked(hook, base)
    return base


_CLASSES: dict[tuple[type, type], type] = {}


def _hooked(hook: type[Hook], base: type) -> type:
    """The one class of a pair: torch.compile must not see a new one in every copy."""
    if (hook, base) not in _CLASSES:
        # It goes by the library's name, by which others may look a class up.
        names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
        names |= {"_hqod_base": base, "_hqod_hook": hook}
        _CLASSES[hook, base] = type(base.__name__, (hook, base), names)
    return _CLASSES[hook, base]


def check_hook(hook: type[Hook], base: type) -> None:
    """Whether a library's class has what a hook overrides.

    Raises:
        RuntimeError: it has not; the message names library, version and place.
    """
    overridden = hook.__mro__[: hook.__mro__.index(Hook)]
    members: dict[str, Any] = {n: v for kind in reversed(overridden) for n, v in vars(kind).items()}
    for name, ours in members.items():
        if name.startswith("_") or not (inspect.isfunction(ours) or isinstance(ours, property)):
            continue
        place, theirs = f"{base.__qualname__}.{name}", inspect.getattr_static(base, name, None)
        if theirs is None or isinstance(ours, property) != isinstance(theirs, property):
            raise gone(hook, base, f"{place} is gone")
        if inspect.isfunction(ours) and _parameters(theirs) != _parameters(ours):
            takes, known = (", ".join(_parameters(method)) for method in (theirs, ours))
            raise gone(hook, base, f"{place} takes ({takes}), not ({known})")


def gone(hook: type[Hook], base: type, what: str) -> RuntimeError:
    """The error of a library that does not compute its loss as the hook knows it."""
    library = base.__module__.partition(".")[0]
    version = getattr(importlib.import_module(library), "__version__", "of an unknown version")
    return RuntimeError(
        f"{library} {version}: {what}, so the terms cannot be added to the loss (seen to work: "
        f"{library} {hook.tested})"
    )


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Names; what is passed on as it comes does not count."""
    parameters = inspect.signature(function).parameters.values()
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.kind not in open_ended]


def add_hook(owner: Any, hook: type[Hook], terms: Terms | None = None) -> None:
    """Put a hook before the class of an object, in place; one that has it gets the terms."""
    if not isinstance(owner, hook):
        check_hook(hook, type(owner))
        owner.__class__ = _hooked(hook, type(owner))
    if terms is not None:
        owner.__dict__["_hqod_terms"] = terms


def remove_hook(owner: Any, hook: type[Hook]) -> None:
    """Give an object the class that it had without a hook; others stay."""
    hooks, base = _hooks(type(owner))
    if hook in hooks:
        owner.__class__ = _with_hooks(tuple(other for other in hooks if other is not hook), base)
        owner.__dict__.pop("_hqod_terms", None)


class Recorder(Hook):
    """Shows what a part of a model returns to who asks for it with :func:`recorded`."""

    tested = "any"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        library: Any = super()
        output = library.__call__(*args, **kwargs)
        seen = self.__dict__.get("_hqod_seen")
        if seen is not None:
            seen.append(output)
        return output


@contextmanager
def recorded(part: Any) -> Iterator[list[Any]]:
    """The outputs of a part with a :class:`Recorder`, while the context lasts.

    Nothing of them stays on the part, which can then be copied and pickled.
    """
    seen: list[Any] = []
    part.__dict__["_hqod_seen"] = seen
    try:
        yield seen
    finally:
        del part.__dict__["_hqod_seen"]


def lookup(model: object, library: str, known: dict[str, Any]) -> Any:
    """What is known of the nearest class of a library that a model is of.

    Args:
        model (object): the model.
        library (str): top-level package.
        known (dict): by class name.

    Raises:
        TypeError: nothing is known of it.
    """
    for kind in type(model).__mro__:
        if kind.__module__.partition(".")[0] == library and kind.__name__ in known:
            return known[kind.__name__]
    raise TypeError(
        f"model: expected one of {library}'s {', '.join(known)}, got {type(model).__name__}"
    )


def _places(model: nn.Module) -> Places:
    for kind in type(model).__mro__:
        module = _LIBRARIES.get(kind.__module__.partition(".")[0])
        if module is not None:
            places: Places = importlib.import_module(module).places(model)
            return places
    raise TypeError(
        f"model: expected a detector of {', '.join(_LIBRARIES)}, got {type(model).__name__}; of a "
        "wrapped model (DistributedDataParallel, torch.compile) give the one inside"
    )


def harmonize(
    model: _Model,
    *,
    hiou_weight: float = 1.0,
    tcorr_weight: float = 1.0,
    variant: str = "official",
    normaliser: str = "official",
    terms: str = "hqod",
) -> _Model:
    """Add the terms of HQOD to the training loss of a detector, in place.

    For every positive sample that the library itself chose, with the score p of its object's class
    and the IoU u of its decoded box with its object, in pixels of the network's input, the loss
    gains ``hiou_weight * HIoU(u) + tcorr_weight * TCorr(p, u)`` (see :func:`hqod_ops.hqod_loss`).
    The sum over a batch is divided as the box loss of the published method is, with no other
    weight of the library's box loss:

    +-----------------------+-------------+-----------------------+--------------------------------+
    | model                 | p           | ``"official"``        | where the loss shows it        |
    +=======================+=============+=======================+================================+
    | torchvision RetinaNet | sigmoid     | sum over images of    | ``losses["loss_hqod"]``        |
    |                       |             | max(positives, 1)     |                                |
    +-----------------------+-------------+-----------------------+--------------------------------+
    | FCOS                  | sigmoid, no | positives             | ``losses["loss_hqod"]``        |
    |                       | centerness  |                       |                                |
    +-----------------------+-------------+-----------------------+--------------------------------+
    | SSD, SSDLite          | softmax     | sum over images of    | ``losses["loss_hqod"]``        |
    |                       |             | max(positives, 1)     |                                |
    +-----------------------+-------------+-----------------------+--------------------------------+
    | Faster, Mask and      | softmax     | sampled proposals     | ``losses["loss_hqod"]``        |
    | Keypoint R-CNN        |             |                       |                                |
    +-----------------------+-------------+-----------------------+--------------------------------+
    | Ultralytics YOLO      | sigmoid     | sum of the assigner's | in the box loss, times the     |
    | v8, 11, v10, 26       |             | target scores         | batch size as that; items gain |
    |                       |             |                       | ``"hqod_loss"``                |
    +-----------------------+-------------+-----------------------+--------------------------------+
    | Transformers DETR     | softmax     | the library's number  | in ``loss``; ``loss_dict`` has |
    |                       |             | of boxes              | ``"loss_hqod"``                |
    +-----------------------+-------------+-----------------------+--------------------------------+
    | Deformable DETR,      | sigmoid     | the same              | the same                       |
    | RT-DETR, RT-DETRv2,   |             |                       |                                |
    | D-FINE                |             |                       |                                |
    +-----------------------+-------------+-----------------------+--------------------------------+

    Divisors are at least 1 and of this process alone, as those of the libraries are (DETR's own
    number of boxes is averaged over processes). The terms are on the last decoder layer of a DETR,
    not on auxiliary and denoising outputs, and on both heads of an end-to-end YOLO.

    The hooks are on the classes of parts of the model: call this again after such a part (a head)
    was replaced. Copies and pickles of the model have them too; what a pickle needs is this
    package. Before or after :func:`hqod_ops.quant.prepare_qat`, before wrapping the model in
    ``DistributedDataParallel`` or ``torch.compile``.

    Args:
        model (nn.Module): one of the models above, or of a class derived from its class; of an
            Ultralytics ``YOLO`` its ``model``.
        hiou_weight (float), tcorr_weight (float): factors of the two terms. Default: 1.0, 1.0
        variant (str): of TCorr: ``"official"`` or ``"geometric"``. Default: ``"official"``
        normaliser (str): ``"official"``, as in the table, or ``"num_pos"``, the number of positives
            of this process. Default: ``"official"``
        terms (str): which loss is added. Default: ``"hqod"``, the only one

    Returns:
        nn.Module: the same object. A second call replaces the options of the first.

    Raises:
        TypeError: another kind of model, or a weight that is no number.
        ValueError: an option that is not known.
        RuntimeError: the installed version of the library computes its loss in another way.

    Source: HQOD (arXiv:2408.02561) and its code.

    Example:
        >>> from torchvision.models.detection import ssdlite320_mobilenet_v3_large
        >>> from hqod_ops.integrations import harmonize
        >>> model = ssdlite320_mobilenet_v3_large(weights_backbone=None, num_classes=3)
        >>> model = harmonize(model, variant="geometric")
    """
    wanted = Terms(hiou_weight, tcorr_weight, variant, normaliser, terms)
    places = list(_places(model))
    for owner, hook in places:  # first, so that an error leaves the model as it was
        if not isinstance(owner, hook):
            check_hook(hook, type(owner))
    for owner, hook in places:
        add_hook(owner, hook, wanted)
    return model


def unharmonize(model: _Model) -> _Model:
    """Undo :func:`harmonize`, in place.

    Args:
        model (nn.Module): a harmonized model; any other of its kind is left as it is.

    Returns:
        nn.Module: the same object, with the loss of its library.

    Raises:
        TypeError: a kind of model that cannot be harmonized.
    """
    for owner, hook in _places(model):
        remove_hook(owner, hook)
    return model
