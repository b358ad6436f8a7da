"""``save="codes"``: layers keep no quantized tensor, and every gradient has the same bits."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from hqod_ops.quant import QATConfig, Rule, calibrate, place_on_producers, prepare_qat
from hqod_ops.quant.quantizers.registry import QUANTIZERS

pytestmark = pytest.mark.require("ext")


class Padded(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Net(nn.Module):
    """Every kind of layer, a head shared by two levels, a residual sum, a tensor read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 8, 1)
        self.mirror = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.own = Padded(8, 8, 3)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Conv2d(8, 4, 3, padding=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.body(x) + self.side(x)).relu()
        x = nn.functional.silu(self.own(self.mirror(x)))
        levels = [self.head(self.up(x)), self.head(nn.functional.max_pool2d(x, 2))]
        tokens = torch.cat([level.flatten(2).mT for level in levels], dim=1)
        return self.out(self.attention(tokens, tokens, tokens)[0] + tokens)


def image(channels_last: bool = False) -> Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=torch.channels_last) if channels_last else x


def made(save: str, model: Callable[[], nn.Module] = Net, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = QATConfig(**{"first": (), "prediction": (), **settings}, save=save)
    return calibrate(prepare_qat(model(), config), [image()], progress=False).train()


def bits(x: Tensor | None) -> Tensor | None:
    """What distinguishes NaN from NaN and -0 from 0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return None if x is None else x.detach().contiguous().view(integers[x.element_size()])


def results(model: nn.Module, x: Tensor | None = None, amp: bool = False) -> list[Tensor | None]:
    """Output and gradients, that of the image among them."""
    x = (image() if x is None else x).clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = model(x)
    y.float().square().sum().backward()
    found = [y, x.grad, *(parameter.grad for parameter in model.parameters())]
    return [bits(tensor) for tensor in found]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(one, other, strict=True)
    )


@contextmanager
def counted() -> Iterator[dict[int, int]]:
    """The bytes of every storage that is saved for the backward pass."""
    found: dict[int, Any] = {}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage  # kept, so that no address is used twice
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


SETTINGS: dict[str, dict[str, Any]] = {
    "lsq": {},
    "2 bits": {"weight_bits": 2, "act_bits": 2, "weight_init": "lsq"},
    "8 bits": {"weight_bits": 8, "act_bits": 8},
    "per channel": {"per_channel": True},
    "foreach": {"foreach": True},
    "producers": {"placement": "producers"},
    "producers, foreach": {"placement": "producers", "foreach": True, "per_channel": True},
    "weights alone": {"act_bits": 32},
    "inputs alone": {"weight_bits": 32},
    **{
        name: {
            f"{part}_quantizer": name
            for part, role in (("weight", "weight"), ("act", "input"))
            if role in kind.roles
        }
        for name, kind in QUANTIZERS.items()
        if name != "lsq"
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_same_bits(settings: dict[str, Any]) -> None:
    plain, codes = made("float", **settings), made("codes", **settings)
    for amp in (False, True):
        assert same(results(codes, amp=amp), results(plain, amp=amp)), f"amp {amp}"
    x = image(channels_last=True)
    for model in (plain, codes):
        model.to(memory_format=torch.channels_last)
    assert same(results(codes, x), results(plain, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    plain, codes = made("float").to(dtype), made("codes").to(dtype)
    assert same(results(codes, image().to(dtype)), results(plain, image().to(dtype)))


def test_values_that_no_code_has() -> None:
    """A NaN stays one, and what is beyond the codes is clamped as it was."""
    x = image()
    x[0, :, 0, 0] = torch.tensor([float("nan"), float("inf"), -1e30])
    x[1] *= 1e4
    plain, codes = made("float", simple), made("codes", simple)
    got, want = results(codes, x), results(plain, x)
    assert want[0] is not None and want[0].view(torch.float32).isnan().any()
    assert same(got, want)


def simple() -> nn.Module:
    """Where all that a layer keeps in float is its quantized tensors."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.Linear(256, 5),
    )


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"placement": "producers"}], ids=str)
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
def test_saves_what_the_float_model_saves(settings: dict[str, Any], amp: bool) -> None:
    """Scales aside, which are small."""
    bytes_of = []
    model = simple()
    for model in (simple(), made("codes", simple, **settings), made("float", simple, **settings)):
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with counted() as sizes, torch.autocast("cpu", torch.bfloat16, enabled=amp):
            model(image().requires_grad_())
        bytes_of.append(sum(size for at, size in sizes.items() if at not in own))
    plain, codes, kept = bytes_of
    assert codes <= plain + 512 and kept > 1.5 * plain


@pytest.mark.parametrize("foreach", [False, True])
def test_nothing_holds_the_quantized_tensors(foreach: bool) -> None:
    """Seen without hooks, which might change what is looked at."""
    alive: dict[str, list[bool]] = {}
    for save in ("codes", "float"):
        model = made(save, simple, foreach=foreach)
        seen: list[weakref.ref[Tensor]] = []
        for layer in model:
            for name in ("quantized_input", "quantized_weight"):
                if hasattr(layer, name):
                    setattr(layer, name, _noting(getattr(layer, name), seen))
        y = model(image())
        gc.collect()
        alive[save] = [ref() is not None for ref in seen]
        y.sum().backward()
    assert len(alive["codes"]) == 8 and not any(alive["codes"])


def _noting(function: Any, seen: list[weakref.ref[Tensor]]) -> Any:
    def call(*args: Any) -> Tensor:
        y: Tensor = function(*args)
        seen.append(weakref.ref(y))
        return y

    return call


def test_a_tensor_of_several_readers() -> None:
    """Behind its producer a quantized tensor is read by layers and by a pooling, which keeps it."""

    class Readers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.left(x) + self.right(x) + nn.functional.max_pool2d(x, 3, 1, 1)

    plain, codes = (made(save, Readers, placement="producers") for save in ("float", "codes"))
    assert same(results(codes), results(plain))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(foreach: bool, reentrant: bool) -> None:
    """A repeated call makes its tensors again from what it finds again."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = simple()[:3], simple()[3:]

        def forward(self, x: Tensor) -> Tensor:
            return self.back(checkpoint(self.front, x, use_reentrant=reentrant))

    plain, codes = (made(save, Checkpointed, foreach=foreach) for save in ("float", "codes"))
    assert same(results(codes), results(plain))
    with counted() as sizes:
        codes(image().requires_grad_())
    assert sum(sizes.values()) > 0


def test_other_hooks_around() -> None:
    plain, codes = made("float"), made("codes")
    want = results(plain)
    with save_on_cpu():
        assert same(results(codes), want)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert same(results(codes), want)


def test_weights_of_many_kinds() -> None:
    def normed() -> nn.Module:
        model = simple()
        parametrizations.weight_norm(model[2])
        return model

    rules = [Rule("4", skip=True), Rule("6", weight_quantizer="minmax", act_bits=32)]
    for foreach in (False, True):
        plain, codes = (
            made(save, normed, foreach=foreach, overrides=rules) for save in ("float", "codes")
        )
        assert same(results(codes), results(plain))


def test_several_passes() -> None:
    """A graph that is kept gives the same again; one that is gone says so."""
    model = made("codes")
    parameters = list(model.parameters())
    loss = model(image()).square().sum()
    options: dict[str, Any] = {"allow_unused": True}
    first = torch.autograd.grad(loss, parameters, retain_graph=True, **options)
    torch.autograd.grad(loss, [model.body.weight], retain_graph=True)  # a part of it
    second = torch.autograd.grad(loss, parameters, **options)
    assert same([bits(g) for g in first], [bits(g) for g in second])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters, **options)


def test_changes_in_place_are_noticed() -> None:
    """As without: of what the quantizer keeps, and of what is saved beside it."""
    model = made("codes", simple)
    x = image().requires_grad_() * 1
    y = model(x)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    model = made("codes", simple, weight_bits=32)
    y = model(image())
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_result_that_is_changed_is_kept() -> None:
    """What a hook does to a quantized tensor is not what the op would make again."""

    def halve(_module: Any, _args: Any, y: Tensor) -> None:
        with torch.no_grad():
            y.mul_(0.5)

    found = []
    for save in ("float", "codes"):
        model = made(save, simple)
        model[2].input_quantizer.register_forward_hook(halve)
        found.append(results(model))
    assert same(*found)


def test_second_derivatives_are_refused() -> None:
    model = made("codes", simple)
    x = image().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        grad.square().sum().backward()


@pytest.mark.parametrize("foreach", [False, True])
def test_compiled(foreach: bool) -> None:
    """A compiler decides by itself what it keeps; the results are those of the eager model."""
    plain, codes = (made(save, simple, foreach=foreach) for save in ("float", "codes"))
    compiled = torch.compile(codes, backend="aot_eager", fullgraph=True)
    got, want = results(compiled), results(plain)
    for a, b in zip(got, want, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a.view(torch.float32), b.view(torch.float32))


def test_copies_and_settings() -> None:
    model = made("codes")
    want = results(model)
    assert same(results(copy.deepcopy(model)), want)
    assert same(results(pickle.loads(pickle.dumps(model))), want)
    assert {m.saved_as for m in model.modules() if hasattr(m, "saved_as")} == {"codes"}
    assert "saved as codes" in str(QATConfig(save="codes"))
    with pytest.raises(ValueError, match="save: expected one of float, codes, got 'int8'"):
        QATConfig(save="int8")
    later = prepare_qat(simple(), "w8a8", first=(), prediction=(), save="codes")
    place_on_producers(later)
    later = calibrate(later, [image()], progress=False)
    assert later[0].saved_as == "codes"
