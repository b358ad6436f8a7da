"""Quantizers of activations where these are made, once for all readers, with ReLUs taken in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Any

from torch import nn

from hqod_ops import checks
from hqod_ops.quant.dataflow.attach import (
    CallQuantizers,
    ExpectedModules,
    pause_within,
    placed_forward,
)
from hqod_ops.quant.dataflow.graph import Dataflow, Site, activation
from hqod_ops.quant.dataflow.see import see_dataflow
from hqod_ops.quant.dataflow.trace import trace_dataflow
from hqod_ops.quant.nn.layers import QATLayer
from hqod_ops.quant.nn.upstream import UpstreamQuantizer
from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.quant.runtime import find_runtime, runtime, track_calls
from hqod_ops.tables import text_table


@dataclass(frozen=True)
class PlacedQuantizer:
    """A quantizer that works where its tensors are made.

    Attributes:
        name (str): full name of the quantizer, that of the first reader's.
        producers (tuple of str): what makes the tensors, in the order of its levels: a module's
            name, or an owner's name and a function; with the number of the call where there are
            several.
        readers (tuple of str): the layers that read them.
        absorbed (str, optional): ``"relu"`` or ``"relu6"``, if it has taken that in.
    """

    name: str
    producers: tuple[str, ...]
    readers: tuple[str, ...]
    absorbed: str | None = None


@dataclass(frozen=True)
class Placement:
    """What :func:`place_on_producers` has done; ``print`` shows it as a table.

    Attributes:
        placed (tuple of PlacedQuantizer): the quantizers that were moved to the producers.
        sole_readers (tuple of str): layers that are the only readers of their inputs, and there is
            no ReLU to take in: a quantizer at the input is the same. Also as ``own``.
        not_placed (mapping of str to str): layers that keep the quantizer at their input, and why.
            Also as ``left``.
        untraced (mapping of str to str): modules whose ``forward`` cannot be traced to its end, and
            why. What they called before, and the pieces in them, were looked at nevertheless.
    """

    placed: tuple[PlacedQuantizer, ...] = ()
    sole_readers: tuple[str, ...] = ()
    not_placed: Mapping[str, str] = field(default_factory=dict)
    untraced: Mapping[str, str] = field(default_factory=dict)

    @property
    def own(self) -> tuple[str, ...]:
        """``sole_readers``."""
        return self.sole_readers

    @property
    def left(self) -> Mapping[str, str]:
        """``not_placed``."""
        return self.not_placed

    def __str__(self) -> str:
        rows = []
        for entry in self.placed:
            columns = zip_longest(entry.producers, [entry.absorbed or ""], entry.readers)
            rows += [[cell or "" for cell in cells] for cells in columns]
        parts = [text_table(["quantized behind", "takes in", "read by"], rows)] if rows else []
        reasons: dict[str, list[str]] = {}
        if self.sole_readers:
            reasons["they alone read it"] = list(self.sole_readers)
        for name, reason in self.not_placed.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            parts.append("\n  ".join([f"quantized at the input, as {reason}:", *names]))
        return "\n\n".join(parts)


def placement(model: nn.Module) -> Placement:
    """What :func:`place_on_producers` has done to a model; empty if it was not called.

    Args:
        model (nn.Module): the model that it was given.
    """
    state = find_runtime(model)
    found = None if state is None else state.placement
    return found if isinstance(found, Placement) else Placement()


def place_on_producers(
    model: nn.Module,
    *,
    skip: str | Sequence[str] = (),
    absorb_relu: bool = True,
    example: Any = None,
    forward: Callable[[Any, Any], object] | None = None,
) -> Placement:
    """Quantize activations where they are made, once, instead of at the input of every layer.

    All readers of such a tensor then see it quantized, also residual additions, poolings and the
    outputs of modules, as in the HQOD code; several layers that read one tensor share one quantizer
    (the first one's), and the backbone's outputs are not quantized again in the neck. Where the
    producer is a ReLU or ReLU6, as a module or a function, the quantizer takes it in: one op, equal
    in value and gradient to the two, with no tensor between them.

    Who reads what is seen in a run of the model on ``example``, whatever its control flow, or found
    with ``torch.fx`` without one. Nothing is replaced by a trace: modules keep their names,
    parameters and classes, and run their own ``forward``. Where a trace ends, in the parts of a
    detector that depend on data, layers keep the quantizers at their inputs, and the report says
    so. That the inputs come from where they were seen to come from is verified by
    :func:`calibrate`. A module without state that several others have, such as one activation for a
    whole network, becomes one for each of them.

    Replace modules before, not after: the next forward pass of the model would raise an error. Only
    a conversion to ``nn.SyncBatchNorm`` is followed.

    Shared heads keep one scale a level; the levels are numbered in the order in which their tensors
    are made.

    Args:
        model (nn.Module): a model from :func:`prepare_qat`, not calibrated yet; the one that was
            given to it.
        skip (str or sequence of str): names or globs of layers that keep the quantizer of their
            own, as all do that read the same tensors. Default: none
        absorb_relu (bool): take in ReLU and ReLU6. Default: True
        example (optional): a batch, such as :func:`calibrate` takes them. The model runs on it in
            eval mode and, if it can, in training mode. Default: None, trace
        forward (callable, optional): ``forward(model, batch)`` runs it. Default: None

    Returns:
        Placement: also to be had later by :func:`placement`.

    Raises:
        ValueError: the model is not prepared, calibrated already, was given before, or a pattern of
            skip fits no layer.

    Source: the placement of quantizers of the HQOD code (arXiv:2408.02561).

    Example:
        >>> from torch import nn
        >>> from hqod_ops.quant import QATConfig, prepare_qat
        >>> from hqod_ops.quant.dataflow.producers import place_on_producers
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> report = place_on_producers(prepare_qat(model, "w8a8"))
        >>> report.placed[0].absorbed, report.placed[0].producers, report.placed[0].readers
        ('relu', ('1',), ('2',))
    """
    checks.module("model", model)
    checks.flag("absorb_relu", absorb_relu)
    layers = _layers(model, skip)
    state = runtime(model)
    if state.expected is not None:
        state.expected.verify(model)
    _separate(model)
    flow = trace_dataflow(model) if example is None else see_dataflow(model, example, forward)
    names = {module: name for name, module in model.named_modules()}
    order = {site: index for index, site in reversed(list(enumerate(flow.order)))}
    groups = _groups(flow, layers)
    unreached = {layer: _barrier(names[layer], flow, names) for layer in layers}
    placed, sole_readers, not_placed = [], [], {}
    for group in groups:
        group.sites.sort(key=order.__getitem__)
        readers = [layer for layer in group.layers if layer in layers]
        for layer in group.layers:
            unreached.pop(layer, None)
        if not readers:
            continue
        group.problem = group.problem or _problem(group, flow, layers, names)
        if absorb_relu and group.problem is None:
            group.activation = _activation(group, flow)
        if group.problem is not None:
            not_placed.update({names[layer]: group.problem for layer in readers})
        elif group.activation is None and not flow.shared.intersection(group.sites):
            sole_readers += [names[layer] for layer in readers]
        else:
            placed.append(group)
    placed.sort(key=lambda group: order[group.sites[0]])
    not_placed.update({names[layer]: reason for layer, reason in unreached.items()})
    report = Placement(
        tuple(_move(group, flow, names) for group in placed),
        tuple(sole_readers),
        not_placed,
        {names[module] or type(module).__name__: why for module, why in flow.failures.items()},
    )
    _attach(placed, flow)
    track_calls(model)
    state.expected, state.placement = ExpectedModules(model), report
    return report


def _separate(model: nn.Module) -> None:
    """Give every module a copy of its own of an activation that it shares with others."""
    owners: dict[nn.Module, nn.Module] = {}
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            if child is None or not type(child).__module__.startswith(
                "torch.nn.modules.activation"
            ):
                continue
            if owners.setdefault(child, owner) is not owner and not (
                child.state_dict() or child._forward_hooks or child._forward_pre_hooks
            ):
                owner._modules[name] = copy.deepcopy(child)


def _layers(model: nn.Module, skip: str | Sequence[str]) -> dict[nn.Module, str | None]:
    """The layers with a quantizer of the input, and why one is left as it is."""
    state = find_runtime(model)
    if state is not None and state.placement is not None:
        raise ValueError("model: expected one whose quantizers were not placed on producers yet")
    patterns = checks.names("skip", skip)
    layers: dict[nn.Module, str | None] = {}
    found: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, QATLayer) and module.input_quantizer is not None:
            if module.input_quantizer.calibrated:
                raise ValueError(
                    f"model: expected one that is not calibrated yet, {name!r} is: place its "
                    "quantizers first"
                )
            fits = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
            found.update(fits)
            layers[module] = "asked for" if fits else None
    if not layers:
        raise ValueError("model: expected a model from prepare_qat, it has no quantized input")
    for pattern in patterns:
        if pattern not in found:
            raise ValueError(f"skip: no layer with a quantized input fits the pattern {pattern!r}")
    return layers


@dataclass(eq=False)
class _Group:
    """Layers and the sites of the tensors that they read, connected: one quantizer serves all."""

    layers: list[nn.Module]
    sites: list[Site]
    problem: str | None = None
    activation: str | None = None

    @property
    def quantizer(self) -> Quantizer:
        quantizer = self.layers[0].input_quantizer
        assert isinstance(quantizer, Quantizer)
        return quantizer


def _groups(flow: Dataflow, layers: Mapping[nn.Module, str | None]) -> list[_Group]:
    groups: list[_Group] = []
    for layer, reads in flow.reads.items():
        sites = list(dict.fromkeys(read.site for read in reads if read.site is not None))
        problem = next((read.problem for read in reads if read.problem), layers.get(layer))
        group = _Group([layer], sites, problem)
        for other in [g for g in groups if set(g.sites).intersection(sites)]:
            groups.remove(other)
            group = _Group(
                [*other.layers, *group.layers],
                list(dict.fromkeys([*other.sites, *group.sites])),
                other.problem or group.problem,
            )
        groups.append(group)
    return groups


def _problem(
    group: _Group,
    flow: Dataflow,
    layers: Mapping[nn.Module, str | None],
    names: Mapping[nn.Module, str],
) -> str | None:
    """Why the layers of a group cannot share one quantizer at the producers."""
    for layer in group.layers:
        if layer not in layers:
            return f"{names[layer]} reads the same tensor in float"
    settings = [_settings(layer.input_quantizer) for layer in group.layers]
    for layer, setting in zip(group.layers, settings, strict=True):
        if setting != settings[0]:
            return f"{names[group.layers[0]]} and {names[layer]} quantize the same tensor otherwise"
    for site in group.sites:
        callers = {owner for owner, what in flow.calls if what is site.what}
        if isinstance(site.what, nn.Module) and len(callers) > 1:
            return f"{names[site.what]} is called by several modules"
    return None


def _settings(quantizer: Any) -> tuple[Any, ...]:
    """What two quantizers must have in common to be one."""
    attributes = vars(quantizer).items()
    given = {key: value for key, value in attributes if key[0] != "_" and key != "label"}
    return type(quantizer), given


def _barrier(name: str, flow: Dataflow, names: Mapping[nn.Module, str]) -> str:
    """Why no trace reaches a layer."""
    around = [m for m in flow.failures if f"{name}.".startswith(f"{names[m]}.") or not names[m]]
    if not around:
        return "no trace reaches them"
    nearest = max(around, key=lambda module: len(names[module]))
    return f"forward of {type(nearest).__name__} cannot be traced: {flow.failures[nearest]}"


def _activation(group: _Group, flow: Dataflow) -> str | None:
    """The activation that the quantizer of a group can take in: the producer of all its tensors."""
    kinds = {activation(site.what) for site in group.sites}
    if len(kinds) != 1 or flow.reread.intersection(group.sites):
        return None
    return kinds.pop() if group.quantizer.absorbs else None


def _move(group: _Group, flow: Dataflow, names: Mapping[nn.Module, str]) -> PlacedQuantizer:
    """Make one quantizer of those of a group, and let the layers take their inputs as they are."""
    quantizer = group.quantizer
    quantizer.activation = group.activation
    places = tuple(_site_name(site, flow, names) for site in group.sites)
    for index, layer in enumerate(group.layers):
        if index:
            # A plain attribute: the state_dict has the quantizer once, with the first reader.
            del layer._modules["input_quantizer"]
            layer.__dict__["input_quantizer"] = quantizer
        assert isinstance(layer, QATLayer)
        layer.upstream = UpstreamQuantizer(names[layer], quantizer, places)
    readers = tuple(names[layer] for layer in group.layers)
    return PlacedQuantizer(quantizer.label, places, readers, group.activation)


def _site_name(site: Site, flow: Dataflow, names: Mapping[nn.Module, str]) -> str:
    if isinstance(site.what, str):
        name = ":".join([names[site.owner] or type(site.owner).__name__, site.what])
    else:
        name = names[site.what]
    return name if flow.calls[site.owner, site.what] == 1 else f"{name}#{site.index + 1}"


def _attach(groups: Sequence[_Group], flow: Dataflow) -> None:
    """Put the quantizers behind their sites."""
    quantizers = {site: group.quantizer for group in groups for site in group.sites}
    keys = dict.fromkeys((site.owner, site.what) for site in quantizers)
    functions: dict[nn.Module, dict[str, CallQuantizers]] = {}
    for owner, what in keys:
        calls = range(flow.calls[owner, what])
        behind = CallQuantizers([quantizers.get(Site(owner, what, index)) for index in calls])
        if behind.differ:
            placed_forward(owner).inner.append(behind)
        if isinstance(what, str):
            functions.setdefault(owner, {})[what] = behind
        else:
            placed_forward(what).behind = behind
    for owner, by_name in functions.items():
        forward = placed_forward(owner)
        forward.watch(by_name)
        for caller, what in flow.calls:
            if caller is owner and isinstance(what, nn.Module):
                pause_within(what, forward)
