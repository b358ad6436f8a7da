"""Weights that are made anew for every forward pass: pruned, normed, parametrized.

What ``torch.nn.utils.prune``, ``weight_norm`` and ``spectral_norm`` leave in ``layer.weight`` is
the result of the last forward pass, and what is written there is gone in the next. So whoever reads
or writes a weight outside of its layer's forward does it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from hqod_ops.quant.batches import evaluating
from hqod_ops.quant.nn.attention import Projection


def _home(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a layer's tensor, and its name there; see ``Projection``."""
    return (layer.owner, layer.stored) if isinstance(layer, Projection) else (layer, name)


def is_derived(layer: nn.Module) -> bool:
    """Whether the weight may be another one within the forward pass than it is now."""
    owner, name = _home(layer, "weight")
    return bool(owner._forward_pre_hooks) or name not in owner._parameters


@torch.no_grad()
def current(layer: nn.Module, name: str = "weight") -> Tensor:
    """The tensor that a layer in eval mode would use now, without a graph.

    Raises:
        ValueError: a hook makes it that cannot run alone.
    """
    owner, _ = _home(layer, name)
    with evaluating(owner):  # in training, a spectral norm would do a step of its iteration
        _refresh(owner)
        value: Tensor = getattr(layer, name)
    return value.detach()


def rewrite(module: nn.Module, name: str, value: Tensor) -> str | None:
    """Write a parameter where it lasts: into what it is made from, if it is derived.

    Returns:
        str, or None: why that is not possible; the module is then as it was.
    """
    # By name: a right_inverse may put other tensors there.
    before = {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}
    problem = ""
    with torch.no_grad():
        try:
            _write(module, name, value)
            found = current(module, name)
        except Exception as error:  # whatever somebody's right_inverse may raise
            problem = f" ({error})"
        else:
            if (
                not value.numel()
                or (found - value).abs().max()
                <= 64 * torch.finfo(value.dtype).eps * value.abs().max()
            ):
                return None
        module.load_state_dict(before)
        current(module, name)
    return f"the {name} is derived, and no such value can be written to it{problem}"


def sources(layer: nn.Module, name: str = "weight") -> list[Tensor]:
    """The parameters and buffers that a tensor is made from or is a part of; none if it is one."""
    owner, name = _home(layer, name)
    if parametrize.is_parametrized(owner, name):
        part: Any = owner.parametrizations
        return [*part[name].parameters(), *part[name].buffers()]
    if any(made == name for made, _ in _makers(owner)):
        return [tensor for _, tensor in _kept(owner, name)]
    return [] if owner is layer else [getattr(owner, name)]


def settle(model: nn.Module) -> None:
    """Make all derived tensors parameters, with the values that they have in eval mode."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parts: Any = module.parametrizations
            values = {name: current(module, name) for name in parts}
            # Not as torch does it, who takes the properties away from the class: of copies, too.
            del module._modules["parametrizations"]
            module.__class__ = type(module).__bases__[0]
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))
        for name, key in list(_makers(module)):
            value = current(module, name)
            del module._forward_pre_hooks[key]
            for kept, _ in _kept(module, name):
                delattr(module, kept)
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(value))


def without_graph(model: nn.Module) -> None:
    """Make derived tensors anew without the graph of the last forward pass, which no copy can be
    made of."""
    with torch.no_grad(), evaluating(model):
        for module in model.modules():
            _refresh(module)


def _makers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The tensors that torch's hooks make, with the hooks' keys."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, BasePruningMethod):
            yield hook._tensor_name, key
        elif isinstance(hook, (WeightNorm, SpectralNorm)):
            yield hook.name, key


def _kept(module: nn.Module, name: str) -> list[tuple[str, Tensor]]:
    """What torch's hooks make a tensor from: ``weight_orig``, ``weight_mask``, ``weight_g``..."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    suffixes = ("orig", "mask", "g", "v", "u")
    return [(key, tensor) for key, tensor in own if key in {f"{name}_{s}" for s in suffixes}]


def _refresh(module: nn.Module) -> None:
    known = dict(_makers(module))
    hooks: dict[int, Any] = dict(module._forward_pre_hooks)
    for key in known.values():
        hooks[key](module, ())
    if not isinstance(vars(module).get("weight"), Tensor) or "weight" in known:
        return
    for key, hook in hooks.items():
        if key in known.values() or key in module._forward_pre_hooks_with_kwargs:
            continue
        try:
            hook(module, ())
        except Exception as error:
            raise ValueError(
                f"{type(module).__name__}: its weight is made by a forward pre-hook that cannot "
                f"run without an input ({type(error).__name__}: {error}); make it with "
                "torch.nn.utils.parametrize, or let the hook ignore its input"
            ) from error


def _write(module: nn.Module, name: str, value: Tensor) -> None:
    if parametrize.is_parametrized(module, name):
        part: Any = module.parametrizations
        try:
            setattr(module, name, value)
        except (RuntimeError, NotImplementedError):
            part[name].original.copy_(value)  # right for a mask, and checked afterwards
        return
    hooks = [module._forward_pre_hooks[key] for made, key in _makers(module) if made == name]
    if not hooks:
        parameter = module._parameters.get(name)
        if parameter is None:
            raise ValueError("other code than torch's makes it")
        parameter.copy_(value)
    for hook in hooks:
        if isinstance(hook, WeightNorm):
            getattr(module, f"{name}_v").copy_(value)
            # A dim of None is that of one norm for all.
            dim = -1 if hook.dim is None else hook.dim
            getattr(module, f"{name}_g").copy_(torch.norm_except_dim(value, 2, dim))
        else:
            original = getattr(module, f"{name}_orig")
            mask = getattr(module, f"{name}_mask", None)
            original.copy_(value if mask is None else torch.where(mask != 0, value, original))
