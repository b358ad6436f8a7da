"""Distillation: a quantized student that learns from the float model, without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from hqod_ops import checks
from hqod_ops.quant.batches import call
from hqod_ops.quant.patterns import Patterns
from hqod_ops.quant.tuning.predictions import prediction_layers, select
from hqod_ops.quant.tuning.running import network
from hqod_ops.quant.tuning.signal import float_leaves


def channel_wise_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Channel-wise distillation: every channel of a map as a distribution over places.

    ``T^2 mean_{b,c} KL(softmax(t_bc / T) || softmax(s_bc / T))``, with the softmax over all places.

    Args:
        student (Tensor[B, C, ...]), teacher (Tensor[B, C, ...]): of one shape.
        temperature (float): T. Default: 1.0

    Returns:
        Tensor: a scalar, 0 where they are alike up to a constant a channel.

    Source: channel-wise knowledge distillation (arXiv:2011.13256).

    Example:
        >>> import torch
        >>> x = torch.randn(2, 3, 4, 4)
        >>> abs(channel_wise_loss(x + 1, x).item()) < 1e-6
        True
    """
    s = F.log_softmax(student.flatten(2).float() / temperature, dim=2)
    t = F.log_softmax(teacher.flatten(2).float() / temperature, dim=2)
    rows = max(s.shape[0] * s.shape[1], 1)
    return F.kl_div(s, t, reduction="sum", log_target=True) * (temperature**2 / rows)


class Distillation:
    """The loss of a student against a teacher that sees the same batch, without labels.

    Whenever the student runs, the teacher runs on the same inputs, and :meth:`loss` then compares
    what both have made:

    ``loss = w_f mean_features CWD(s, t) + w_p mean_predictions mean((s - t)^2) / var(t)``

    with :func:`channel_wise_loss` of the features and, relative to their variance, the squared
    error of the predictions. Beside labels, it is one term more::

        distillation = Distillation(student, teacher)
        for images, targets in loader:
            loss = criterion(student(images), targets) + distillation.loss()

    and alone, ``loss = distillation(images)``.

    Args:
        student (nn.Module): the model that the training loop calls, prepared or not, wrapped in
            ``DistributedDataParallel`` or not.
        teacher (nn.Module): the float model, in eval mode; it gets no gradient.
        features (str, sequence of str or mapping): ``"auto"``: what the prediction layers read.
            Else names or globs of modules whose outputs are features; or a mapping from names in
            the student to names in another teacher. ``()`` for none. Default: ``"auto"``
        predictions (str, sequence of str or mapping): ``"auto"``: the outputs of the prediction
            layers (see :func:`hqod_ops.quant.prepare_qat`); else as features. Default: ``"auto"``
        feature_weight (float), prediction_weight (float): w_f and w_p. Default: 1.0
        temperature (float): see :func:`channel_wise_loss`. Default: 1.0
        forward (callable, optional): ``forward(teacher, *args)`` runs the teacher on what the
            student was called with. Default: None, with the first argument alone

    Raises:
        ValueError: the teacher is in training mode, a name fits no module, or there is nothing to
            compare; in a call: the outputs differ in shape or number.

    Source: channel-wise knowledge distillation (arXiv:2011.13256).

    Example:
        >>> import copy, torch
        >>> from torch import nn
        >>> from hqod_ops.quant import calibrate, prepare_qat
        >>> from hqod_ops.quant.tuning import Distillation
        >>> teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
        >>> batch = torch.rand(4, 3, 8, 8)
        >>> student = prepare_qat(copy.deepcopy(teacher), "hqod_w4a4", first="0", prediction="2")
        >>> student = calibrate(student, [batch], progress=False).train()
        >>> distillation = Distillation(student, teacher, features="1", predictions="2")
        >>> distillation(batch).backward()
        >>> bool(student[0].weight.grad.abs().sum() > 0)
        True
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        features: Patterns | Mapping[str, str] = "auto",
        predictions: Patterns | Mapping[str, str] = "auto",
        *,
        feature_weight: float = 1.0,
        prediction_weight: float = 1.0,
        temperature: float = 1.0,
        forward: Callable[..., object] | None = None,
    ) -> None:
        checks.module("student", student)
        checks.module("teacher", teacher)
        checks.function("forward", forward)
        checks.at_least("feature_weight", feature_weight, 0)
        checks.at_least("prediction_weight", prediction_weight, 0)
        if teacher.training:
            raise ValueError("teacher: expected it in eval mode, call teacher.eval() first")
        self.student, self.teacher = student, teacher
        self.weights = feature_weight, prediction_weight
        self.temperature, self._forward = temperature, forward
        inner = network(student)
        layers = prediction_layers(inner)
        self._features = _pairs("features", inner, teacher, features, layers)
        self._predictions = _pairs("predictions", inner, teacher, predictions, layers)
        if not self._features and not self._predictions:
            raise ValueError(
                "features: expected something to compare, got neither features nor predictions"
            )
        self._reads = features == "auto"
        self._seen: dict[tuple[str, str], tuple[list[Tensor], list[Tensor]]] = {}
        self._handles: list[RemovableHandle] = [inner.register_forward_pre_hook(self._run_teacher)]
        for place, model in enumerate((inner, teacher)):
            for pair in self._features:
                self._watch(model, pair[place], ("features", pair[0]), place, self._reads)
            for pair in self._predictions:
                self._watch(model, pair[place], ("predictions", pair[0]), place, False)

    def _watch(
        self, model: nn.Module, name: str, key: tuple[str, str], place: int, reads: bool
    ) -> None:
        """Keep what a module returns, or reads."""

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if key in self._seen and (place or torch.is_grad_enabled()):
                found = args[0] if reads else output
                self._seen[key][place].extend(float_leaves(found))

        self._handles.append(model.get_submodule(name).register_forward_hook(after))

    def _run_teacher(self, student: nn.Module, args: tuple[Any, ...]) -> None:
        keys = [("features", pair[0]) for pair in self._features]
        keys += [("predictions", pair[0]) for pair in self._predictions]
        if not torch.is_grad_enabled():  # an evaluation of the student
            return
        self._seen = {key: ([], []) for key in keys}
        with torch.no_grad():
            if self._forward is not None:
                self._forward(self.teacher, *args)
            else:
                self.teacher(*args[:1])

    def __call__(self, batch: Any, forward: Callable[[Any, Any], object] | None = None) -> Tensor:
        """Run the student on a batch, as :func:`hqod_ops.quant.calibrate` does, and its loss."""
        call(self.student, batch, forward)
        return self.loss()

    def loss(self) -> Tensor:
        """The loss of the batch that the student ran last, once.

        Raises:
            ValueError: the student has not run since, or the outputs differ in shape or number.
        """
        seen, self._seen = self._seen, {}
        if not seen:
            raise ValueError("loss: expected the student to have run on a batch, with gradients")
        terms: dict[str, list[Tensor]] = {"features": [], "predictions": []}
        for (kind, name), (own, wanted) in seen.items():
            shapes = [[tuple(x.shape) for x in found] for found in (own, wanted)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{kind}: {name!r}: expected tensors of the same shapes from student and "
                    f"teacher, got {shapes[0]} and {shapes[1]}"
                )
            maps = kind == "features"
            for s, t in zip(own, wanted, strict=True):
                if maps and s.dim() > 2:
                    terms[kind].append(channel_wise_loss(s, t, self.temperature))
                else:
                    variance = t.float().var(correction=0).clamp(min=1e-12)
                    terms[kind].append((s - t).float().square().mean() / variance)
        losses = [
            weight * torch.stack(found).mean()
            for weight, found in zip(self.weights, terms.values(), strict=True)
            if found
        ]
        if not losses:
            raise ValueError("features: none of the modules was called in this batch")
        return torch.stack(losses).sum()

    def close(self) -> None:
        """Take the hooks from both models."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _pairs(
    argument: str,
    student: nn.Module,
    teacher: nn.Module,
    names: Patterns | Mapping[str, str],
    layers: list[str],
) -> list[tuple[str, str]]:
    """Names in student and teacher."""
    if isinstance(names, Mapping):
        pairs = list(names.items())
    elif names == "auto":
        if not layers:
            raise ValueError(
                f"{argument}: the prediction layers of a {type(student).__name__} are not known; "
                "name modules"
            )
        pairs = [(name, name) for name in layers]
    else:
        pairs = [(name, name) for name in select(argument, student, names)]
    for place, (model, whose) in enumerate(((student, "student"), (teacher, "teacher"))):
        known_names = {name for name, _ in model.named_modules()}
        for pair in pairs:
            if pair[place] not in known_names:
                raise ValueError(f"{argument}: the {whose} has no module {pair[place]!r}")
    return pairs
