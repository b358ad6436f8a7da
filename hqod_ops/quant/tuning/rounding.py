"""Learned rounding: the codes of weights that give the float model's outputs, block by block."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hqod_ops import checks
from hqod_ops.quant.batches import check_run, evaluating
from hqod_ops.quant.nn.layers import QATLayer
from hqod_ops.quant.patterns import Patterns
from hqod_ops.quant.quantizers import Quantizer
from hqod_ops.quant.tuning.blocks import Part, find_parts
from hqod_ops.quant.tuning.pairs import check_same, hooked, quantized_layers
from hqod_ops.quant.tuning.reconstruct import Cache, Objective, record
from hqod_ops.quant.tuning.running import shown, together
from hqod_ops.quant.tuning.soft import SoftRounding, can_learn

_Model = TypeVar("_Model", bound=nn.Module)

EXACT_BITS = 8
"""Inputs of so many bits are as good as unquantized: none of their values is dropped."""


@dataclass(frozen=True)
class Settings:
    """How the rounding of a part is learned; see :func:`learn_rounding`."""

    steps: int
    batch_size: int
    rate: float
    tune: float
    drop: float
    seed: int


@dataclass(frozen=True)
class PartResult:
    """What learning did for a part: its error before and after, and how many codes changed."""

    name: str
    before: float
    after: float
    changed: int
    weights: int


def learn_rounding(
    model: _Model,
    float_model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 300,
    blocks: Patterns | None = "auto",
    batch_size: int = 8,
    rate: float = 0.03,
    tune: float = 0.002,
    drop: float = 0.0,
    cache_mb: float = 1024.0,
    forward: Callable[[Any, Any], object] | None = None,
    progress: bool = True,
    seed: int = 0,
    report: Callable[[PartResult], object] | None = None,
) -> _Model:
    """Learn for every weight whether it is rounded up or down, so that outputs are those in float.

    Part by part in the order of the model, a part being a block or a layer with the batch
    normalisation that reads it, Adam minimises over random images

    ``mean((y - y_float)^2) / e``

    where y is the part's output for inputs from the model quantized so far and e its error at the
    start, over a variable h in [0, 1] for every weight, which says how far its code is rounded up
    (AdaRound). Codes are those of h rounded, and gradients pass that unchanged: what is measured
    while it learns is what there will be, and a few hundred steps do where AdaRound's annealing
    of soft codes takes some ten thousand. A weight that is to be rounded the other way becomes
    the value it is rounded to: what was learned is in the weights, and state dicts and exports know
    nothing of it.

    With it, at a rate of their own, the trained scales of inputs, biases, and weight and bias of
    batch normalisations are tuned. With ``drop``, input values are left unquantized at random while
    it learns (QDrop). A part whose error has not become
    less on the images it has seen is put back as it was. Labels are not used.

    Calibrate first; :func:`reestimate_batch_norm` before it, for running statistics count as they
    are.

    In a distributed run every process calls it with batches of its own; gradients are averaged, and
    all get the same weights.

    Args:
        model (nn.Module): a calibrated model from :func:`hqod_ops.quant.prepare_qat`.
        float_model (nn.Module): the model as it was before.
        batches (iterable): of unlabelled images, as :func:`hqod_ops.quant.calibrate` takes them; a
            few hundred images. They are held, and run twice for every part.
        steps (int): of the optimizer, for each part. Default: 300
        blocks (str or sequence of str, optional): names or globs of modules that are reconstructed
            as a whole (BRECQ); each takes and returns one tensor. ``"auto"`` finds the largest ones
            with 2 to 8 quantized layers. None: layer by layer (AdaRound). Default: ``"auto"``
        batch_size (int): images of one step. Default: 8
        rate (float): learning rate of the rounding. Default: 0.03
        tune (float): learning rate of the rest, relative to its size; 0 leaves it as it is.
            Default: 0.002
        drop (float): probability with which an input value is left unquantized. Default: 0.0
        cache_mb (float): inputs and outputs of one part are held on the CPU, of so many batches as
            fit into so many MB, at least of one. Default: 1024
        forward (callable, optional): ``forward(model, batch)`` runs one batch. Default: None
        progress (bool): show a bar, if rich is installed. Default: True
        seed (int): of the random choice of images. Default: 0
        report (callable, optional): called with a :class:`PartResult` after each part. Default:
            None

    Returns:
        nn.Module: the same object.

    Raises:
        ValueError: the model is not prepared, the float model is another one (naming the first
            layer that differs), there was no batch, a name in blocks fits no module, or a number is
            out of range.
        RuntimeError: a quantizer was never calibrated, or it failed in another process.

    Source: AdaRound (arXiv:2004.10568), BRECQ (arXiv:2102.05426), QDrop (arXiv:2203.05740).

    Example:
        >>> import copy, torch
        >>> from torch import nn
        >>> from hqod_ops.quant import calibrate, prepare_qat
        >>> from hqod_ops.quant.tuning import learn_rounding
        >>> _ = torch.manual_seed(0)
        >>> layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> float_model, batches = nn.Sequential(*layers).eval(), [torch.rand(16, 3, 8, 8)]
        >>> model = prepare_qat(copy.deepcopy(float_model), "hqod_w2a2", first=(), prediction=())
        >>> model = calibrate(model, batches, progress=False)
        >>> def error():
        ...     return (model(batches[0]) - float_model(batches[0])).square().mean().item()
        >>> before = error()
        >>> model = learn_rounding(model, float_model, batches, steps=50, progress=False)
        >>> error() < before
        True
    """
    check_run(model, batches, forward, steps=steps, float_model=float_model)
    checks.count("batch_size", batch_size)
    checks.integer("seed", seed)
    checks.function("report", report)
    checks.number("drop", drop)
    if not 0 <= drop <= 1:
        raise ValueError(f"drop: expected a probability in [0, 1], got {drop}")
    for name, number in (("rate", rate), ("tune", tune), ("cache_mb", cache_mb)):
        checks.at_least(name, number, 0)
    settings = Settings(steps, batch_size, rate, tune, drop, seed)
    layers = quantized_layers(model)
    check_same(model, float_model, layers)
    held = list(batches)
    counts = together(lambda: len(held), "learning the rounding")
    if not all(counts):
        raise ValueError("batches: expected at least one batch in every process, got none")
    odd = [n for n, m in layers.items() if m.weight_quantizer and not can_learn(m)]
    if odd:
        warnings.warn(
            "learn_rounding: these weights are made anew, or rounded as a function of them, and "
            f"their rounding stays: {', '.join(odd)}",
            stacklevel=2,
        )
    with evaluating(model), evaluating(float_model):
        parts = find_parts(model, held[0], forward, blocks)
        check_same(model, float_model, [name for part in parts for name in part.names])
        for part in shown(parts, "learn rounding", progress):
            cache = Cache(cache_mb)
            fill = partial(record, model, float_model, part, held, forward, cache)
            together(fill, "learning the rounding")
            result = _learn(model, part, cache, settings)
            if report is not None:
                report(result)
    return model


def _learn(model: nn.Module, part: Part, cache: Cache, settings: Settings) -> PartResult:
    """Learn the rounding of one part."""
    modules = part.modules(model)
    layers = [model.get_submodule(name) for name in part.layers]
    objective = Objective(cache, settings.batch_size, settings.seed)
    before = objective.start(modules)
    saved = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]
    changed = weights = 0
    with _soft(layers) as softs:
        _optimise(modules, list(softs.values()), objective, settings)
    for layer, soft in softs.items():
        changed += soft.land(layer.weight)
        weights += layer.weight.numel()
    after = objective.error(modules)
    if not after < before:
        for module, state in zip(modules, saved, strict=True):
            module.load_state_dict(state)
        changed, after = 0, before
    return PartResult(part.name, before, after, changed, weights)


def _optimise(
    modules: list[nn.Module], softs: list[SoftRounding], objective: Objective, settings: Settings
) -> None:
    tuned = _tuned(modules) if settings.tune else []
    groups: list[dict[str, Any]] = []
    if softs and settings.rate:
        groups.append({"params": [soft.logits for soft in softs], "lr": settings.rate})
    groups += [{"params": [p], "lr": settings.tune * _size(p)} for p in tuned]
    if not groups:
        return
    params = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    wanted = [p.requires_grad for p in params]
    with _dropped(modules, settings.drop, objective.generator):
        for p in params:
            p.requires_grad_(True)
        try:
            for _ in range(settings.steps):
                with torch.enable_grad():
                    loss = objective.loss(modules, settings.drop)
                    grads = torch.autograd.grad(loss, params, allow_unused=True)
                for p, grad in zip(params, grads, strict=True):
                    p.grad = torch.zeros_like(p) if grad is None else grad
                objective.average([p.grad for p in params])
                optimizer.step()
                schedule.step()
        finally:
            for p, flag in zip(params, wanted, strict=True):
                p.requires_grad_(flag)
                p.grad = None


def _tuned(modules: list[nn.Module]) -> list[nn.Parameter]:
    """Biases, and what batch normalisations and the quantizers of inputs have learned."""
    found: dict[int, nn.Parameter] = {}
    for module in (m for top in modules for m in top.modules()):
        if isinstance(module, QATLayer):
            own = [module.bias]
            if module.input_quantizer is not None:
                own += list(module.input_quantizer.parameters())
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            own = [module.weight, module.bias]
        else:
            continue
        found.update({id(p): p for p in own if isinstance(p, nn.Parameter) and p.requires_grad})
    return list(found.values())


def _size(p: Tensor) -> float:
    """The root of the mean square; 1 where all is 0."""
    return float(p.detach().double().square().mean().sqrt()) or 1.0


@contextmanager
def _soft(layers: list[Any]) -> Iterator[dict[Any, SoftRounding]]:
    """The layers with soft rounding in place of their weights' quantizers."""
    softs = {layer: SoftRounding(layer) for layer in layers if can_learn(layer)}
    quantizers = {layer: layer.weight_quantizer for layer in softs}
    try:
        for layer, soft in softs.items():
            layer.weight_quantizer = soft
        yield softs
    finally:
        for layer, quantizer in quantizers.items():
            layer.weight_quantizer = quantizer


@contextmanager
def _dropped(modules: list[nn.Module], share: float, generator: torch.Generator) -> Iterator[None]:
    """Leave values unquantized at random, behind the quantizers of inputs."""
    weights = {
        m.weight_quantizer for top in modules for m in top.modules() if isinstance(m, QATLayer)
    }
    inputs = {
        str(index): m
        for index, m in enumerate(m for top in modules for m in top.modules())
        if isinstance(m, Quantizer) and m not in weights and m.bits < EXACT_BITS
    }

    def after(name: str, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        quantizer: Any = inputs[name]
        left = torch.rand(output.shape, generator=generator).to(output.device) < share
        return torch.where(left, quantizer.activate(args[0]), output)

    if not share:
        yield
        return
    with hooked(inputs, after=after):
        yield
