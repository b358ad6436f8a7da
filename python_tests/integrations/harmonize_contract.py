"""What harmonize owes the models of every library; each library's test runs all of it."""

from __future__ import annotations

import copy
import importlib
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hqod_ops.integrations import harmonize, unharmonize
from hqod_ops.quant import QATConfig, calibrate, prepare_qat
from python_tests.ranks import run_ranks

OBJECTS, NONE, MIXED = "objects", "none", "mixed"
"""Batches: of two images with objects, of two without one, of one with and one without."""


class Loss(NamedTuple):
    """Of a training step."""

    total: Tensor
    term: Tensor
    """Its part that harmonize adds."""


class Positives(NamedTuple):
    """What the library chose, gathered without the code under test."""

    pred: Tensor  # [P, 4], in pixels
    target: Tensor  # [P, 4]
    scores: Tensor  # [P], probabilities
    divisor: float
    factor: float = 1.0
    """Of the library on its whole loss."""


@dataclass(frozen=True)
class Case:
    """A detector of a library."""

    make: Callable[[], nn.Module]
    """A float model in training mode; the same weights at every call."""
    batch: Callable[[str], Any]
    """One of the batches above."""
    loss: Callable[[nn.Module, Any], Tensor]
    """The whole training loss, with gradients."""
    term: Callable[[nn.Module, Any], Loss]
    """The loss, and what a harmonized model names as the part that is ours."""
    positives: Callable[[nn.Module, Any], list[Positives]]
    """Of a model without hooks; one entry for each place where terms are added."""
    double: Callable[[Any], Any]
    """A batch in float64."""
    config: QATConfig | str = "hqod_w4a4"


def spied(owner: Any, name: str) -> Any:
    """Patches a method so that its calls are seen: (arguments without self, result)."""
    calls: list[tuple[Any, Any]] = []
    original = getattr(owner, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        # What comes later may change it in place.
        calls.append((args, tree_map(lambda x: x if _in_graph(x) else copy.deepcopy(x), result)))
        return result

    return mock.patch.object(owner, name, method), calls


def _in_graph(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def run(case: Case, model: nn.Module, batch: Any) -> Tensor:
    """The loss; libraries draw samples at random."""
    torch.manual_seed(3)
    return case.loss(model, batch)


def term(case: Case, model: nn.Module, batch: Any) -> Loss:
    torch.manual_seed(3)
    return case.term(model, batch)


def positives(case: Case, model: nn.Module, batch: Any) -> list[Positives]:
    torch.manual_seed(3)
    return case.positives(model, batch)


def expected(found: list[Positives], hiou: float, tcorr: float, variant: str, own: bool) -> Tensor:
    """The published formulas, written out."""
    total = torch.zeros((), dtype=torch.float64)
    e = 2.220446049250313e-16
    for pred, target, p, divisor, factor in found:
        low, high = torch.maximum(pred[:, :2], target[:, :2]), torch.minimum(pred, target)[:, 2:]
        inter = (high - low).clamp(min=0).prod(1)
        area = (pred[:, 2:] - pred[:, :2]).clamp(min=0).prod(1)
        u = inter / (area + (target[:, 2:] - target[:, :2]).prod(1) - inter).clamp(min=1e-6)
        c = (p + e) ** u * (u + e) ** p - e if variant == "official" else ((p + e) * (u + e)).sqrt()
        agreement = (1 + (p - u).abs().detach()) * ((-c).exp() - torch.tensor(-1.0).double().exp())
        harmony = 1.5 * (1 - u) * (1 + u) ** 0.8
        total = total + factor * (hiou * harmony + tcorr * agreement).sum() / (
            divisor if own else max(len(pred), 1)
        )
    return total


def gradients(loss: Tensor, model: nn.Module) -> Tensor:
    """Of all parameters, in one vector."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert any(g is not None for g in grads)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(parameters, grads, strict=True)
        ]
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"normaliser": "num_pos", "variant": "geometric", "hiou_weight": 0.5, "tcorr_weight": 2.0},
]


def check_values(case: Case) -> None:
    """Value and gradient, in float64, with every option; the library's own loss is untouched."""
    torch.set_default_dtype(torch.float64)  # some libraries add up in a tensor of that dtype
    try:
        for content, options in zip((MIXED, OBJECTS), OPTIONS, strict=True):
            check_value(case, content, options)
    finally:
        torch.set_default_dtype(torch.float32)


def check_value(case: Case, content: str, options: dict[str, Any]) -> None:
    model, batch = case.make().double(), case.double(case.batch(content))
    before = run(case, model, batch)
    found = positives(case, model, batch)
    assert all(len(f.pred) > 0 for f in found)
    wanted = expected(
        found,
        options.get("hiou_weight", 1.0),
        options.get("tcorr_weight", 1.0),
        options.get("variant", "official"),
        "normaliser" not in options,
    )
    wanted_grad = gradients(wanted, model)
    harmonize(model, **options)
    total, ours = term(case, model, batch)
    # Sums of some hundred rounded numbers in another order.
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(total - before, wanted, rtol=1e-9, atol=1e-10)
    grad = gradients(ours, model)
    assert wanted_grad.norm() > 0
    # D-FINE takes a part of its boxes through float32.
    assert (grad - wanted_grad).norm() <= 1e-7 * wanted_grad.norm()


def check_no_objects(case: Case) -> None:
    model = harmonize(case.make())
    loss, ours = term(case, model, case.batch(NONE))
    assert ours.item() == 0 and torch.isfinite(loss)
    assert torch.isfinite(gradients(loss, model)).all()


def spoiled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.fill_(float("nan"))
    return model


def check_copies(case: Case) -> None:
    """Deep copies (an EMA's) and pickles have hooks of their own, before and after a step."""
    batch = case.batch(OBJECTS)
    model = harmonize(case.make())
    for _ in range(2):
        # Some libraries keep statistics in training: every copy sees the model as it is now.
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = {
            "deepcopy": copy.deepcopy(model),
            "pickle": torch.load(file, weights_only=False),
            "ema": torch.optim.swa_utils.AveragedModel(model).module,
        }
        spoiled(copy.deepcopy(model))
        loss = term(case, model, batch)
        for name, twin in copies.items():
            copied = term(case, twin, batch)
            assert torch.equal(loss.total, copied.total), name
            assert torch.equal(loss.term, copied.term) and copied.term > 0, name
        twin = copies["deepcopy"]
        # NaN everywhere: a hook that runs the original's parts would give a finite loss. Libraries
        # may refuse to match NaN, which shows as much.
        try:
            broken = run(case, spoiled(twin), batch)
        except (ValueError, AssertionError, RuntimeError, IndexError):
            broken = torch.tensor(float("nan"))
        assert not torch.isfinite(broken)
        loss.total.backward()


def check_undone(case: Case) -> None:
    model, batch = case.make(), case.batch(OBJECTS)
    with torch.no_grad():
        first = copy.deepcopy(model)
        before = run(case, first, batch)
    kinds = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    assert unharmonize(model) is model
    assert harmonize(harmonize(model), hiou_weight=0.5) is model
    unharmonize(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(vars(m)) for m in model.modules()] == attributes
    # Also after a loss was computed with the hooks.
    trained = harmonize(copy.deepcopy(model))
    run(case, trained, batch)
    unharmonize(trained)
    trained.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(run(case, model, batch), before)
        assert torch.equal(run(case, trained, batch), before)


def prepared(case: Case, model: nn.Module) -> nn.Module:
    prepare_qat(model, case.config)
    return calibrate(model, [case.batch(OBJECTS)], progress=False).train()


def check_prepared(case: Case) -> None:
    """Before or after prepare_qat is the same; every scale that can gets a gradient."""
    batch = case.batch(OBJECTS)
    first = prepared(case, harmonize(case.make()))
    then = harmonize(prepared(case, case.make()))
    one, other = term(case, first, batch), term(case, then, batch)
    assert torch.equal(one.total, other.total) and torch.equal(one.term, other.term)
    assert one.term > 0
    grads = gradients(one.total, first)
    assert torch.isfinite(grads).all() and torch.equal(grads, gradients(other.total, then))


def check_autocast(case: Case) -> None:
    """In bfloat16: boxes are decoded, and terms computed, in float32 from the network's outputs."""
    batch = case.batch(OBJECTS)
    model = case.make()
    with torch.autocast("cpu", torch.bfloat16):
        found = positives(case, model, batch)
        wanted = expected(found, 1.0, 1.0, "official", True)
        harmonize(model)
        total, ours = term(case, model, batch)
    assert {total.dtype, ours.dtype} <= {torch.float32, torch.float64}
    # The oracle decodes the same outputs; only float32's own error is left.
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(gradients(total, model)).all()


def check_accumulated(case: Case) -> None:
    """Steps in a row, gradients added up: what one step left behind does not reach the next."""
    model = harmonize(case.make()).eval()
    if not hasattr(model, "config"):  # Transformers computes a loss in evaluation mode, too
        model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    batches = [case.batch(OBJECTS), case.batch(MIXED)]
    alone = [gradients(run(case, model, batch), model) for batch in batches]
    for batch in batches:
        run(case, model, batch).backward()
    both = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    kept = torch.cat(
        [
            torch.full((p.numel(),), p.grad is not None)
            for p in model.parameters()
            if p.requires_grad
        ]
    )
    wanted = (alone[0] + alone[1])[kept]
    assert (both - wanted).norm() <= 1e-5 * wanted.norm()


CHECKS = [
    check_values,
    check_no_objects,
    check_copies,
    check_undone,
    check_prepared,
    check_autocast,
    check_accumulated,
]


def pairs(names: Iterable[str], alike: Iterable[str]) -> list[tuple[str, Callable[[Case], None]]]:
    """Every check of every case; of those whose loss is that of another what tells them apart."""
    few = (check_values, check_prepared)
    return [(n, check) for n in names for check in CHECKS if n not in alike or check in few]


def check_compiled(case: Case) -> None:
    """As eager, by what Dynamo traced; a backend would round otherwise."""
    batch = case.batch(OBJECTS)
    model = harmonize(case.make())
    wanted = term(case, copy.deepcopy(model), batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):  # the second finds what the first one left
        model.load_state_dict(harmonize(case.make()).state_dict())
        found = term(case, compiled, batch)
        torch.testing.assert_close(found.total, wanted.total, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.term, wanted.term, rtol=1e-4, atol=1e-4)


def check_ranks(work: Callable[[int], Any], case: Case, folder: Any) -> None:
    """Two processes: each divides by what is its own, gradients are averaged.

    Args:
        work (callable): :func:`of_rank` of the case, picklable.
        case (Case): the same.
        folder (Path): an empty folder.
    """
    ranks = run_ranks(work, folder)
    assert torch.equal(ranks[0], ranks[1])
    alone = []
    for content in (OBJECTS, MIXED):
        model = harmonize(case.make())
        alone.append(gradients(run(case, model, case.batch(content)), model))
    wanted = (alone[0] + alone[1]) / 2
    assert (ranks[0] - wanted).norm() <= 1e-5 * wanted.norm()


def of_rank(case: Case, rank: int) -> Tensor:
    """The averaged gradients of a step with DistributedDataParallel."""
    model = harmonize(case.make())
    parallel = nn.parallel.DistributedDataParallel(
        model, find_unused_parameters=True, broadcast_buffers=False
    )
    run(case, parallel, case.batch((OBJECTS, MIXED)[rank])).backward()
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
            for p in model.parameters()
            if p.requires_grad
        ]
    )


def check_gone(
    monkeypatch: pytest.MonkeyPatch, case: Case, owner: type, name: str, library: str
) -> None:
    """A library without the place, or with another signature there, is refused by name."""
    version = re.escape(importlib.import_module(library).__version__)
    model = case.make()
    kinds = [type(m) for m in model.modules()]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda self, something_else: None)
        message = rf"{library} {version}: {owner.__name__}\.{name} takes \(self, something_else\)"
        with pytest.raises(RuntimeError, match=message):
            harmonize(model)
    with monkeypatch.context() as patch:
        for kind in owner.__mro__:
            if name in vars(kind):
                patch.delattr(kind, name)
        with pytest.raises(RuntimeError, match=rf"{library} {version}: .*{name} is gone"):
            harmonize(model)
    assert [type(m) for m in model.modules()] == kinds
