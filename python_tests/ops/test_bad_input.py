"""Bad input is answered by one clear exception that names the argument and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hqod_ops
from hqod_ops import (
    FakeQuant,
    HarmoniousIoULoss,
    HQODLoss,
    TCorrLoss,
    aligned_box_iou,
    fake_quant,
    fake_quant_foreach,
    harmonious_iou_loss,
    hqod_loss,
    tcorr_loss,
)
from hqod_ops.testing.device import DEVICE

NAN, INF = float("nan"), float("inf")
B = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 4.0], [2.0, 2.0, 9.0, 9.0]]).to(DEVICE)
P = torch.tensor([0.2, 0.5, 0.9]).to(DEVICE)
X = torch.randn(3, 4, 5).to(DEVICE)
S = torch.tensor(0.1).to(DEVICE)
C = torch.full((4,), 0.1).to(DEVICE)
HERE = str(DEVICE)
ELSEWHERE = "meta" if HERE == "cpu" else "cpu"
W4: dict[str, Any] = {"quant_min": -8, "quant_max": 7}

Case = tuple[Callable[[], Any], type[Exception], tuple[str, ...]]


def box_cases() -> dict[str, Case]:
    """What the three ops over pairs of boxes have in common."""
    ops: dict[str, tuple[Callable[..., Any], str, str]] = {
        "iou": (aligned_box_iou, "boxes1", "boxes2"),
        "hiou": (harmonious_iou_loss, "pred", "target"),
        "hqod": (lambda a, b: hqod_loss(a, b, P), "pred", "target"),
    }
    cases: dict[str, Case] = {}
    for name, (op, one, two) in ops.items():
        both = (one, two)
        wide = torch.zeros(3, 5).to(DEVICE)
        cases |= {
            f"{name}: fewer": (lambda op=op: op(B, B[:2]), ValueError, (*both, "(3, 4)", "(2, 4)")),
            f"{name}: no broadcast": (lambda op=op: op(B, B[:1]), ValueError, (*both, "(1, 4)")),
            f"{name}: no broadcast 1-D": (lambda op=op: op(B[0], B), ValueError, (*both, "(4,)")),
            f"{name}: last dim": (lambda op=op, w=wide: op(w, w), ValueError,
                                  (one, "[..., 4]", "(3, 5)")),
            f"{name}: 0-dim": (lambda op=op: op(S, S), ValueError, (one, "[..., 4]", "()")),
            f"{name}: integer": (lambda op=op: op(B.long(), B.long()), TypeError,
                                 (one, "floating", "torch.int64")),
            f"{name}: bool": (lambda op=op: op(B, B > 1), TypeError, (two, "torch.bool")),
            f"{name}: complex": (lambda op=op: op(B.cfloat(), B), TypeError, (one, "complex64")),
            f"{name}: float8": (lambda op=op: op(B.to(torch.float8_e5m2), B), TypeError,
                                (one, "float8_e5m2")),
            f"{name}: mixed": (lambda op=op: op(B, B.double()), TypeError,
                               (two, one, "float32", "float64")),
            f"{name}: mixed half": (lambda op=op: op(B.half(), B.bfloat16()), TypeError,
                                    (two, "float16", "bfloat16")),
            f"{name}: devices": (lambda op=op: op(B, B.to(ELSEWHERE)), ValueError,
                                 (two, one, HERE, ELSEWHERE)),
            f"{name}: list": (lambda op=op: op(B.tolist(), B), TypeError, (one, "Tensor", "list")),
            f"{name}: None": (lambda op=op: op(B, None), TypeError, (two, "Tensor", "NoneType")),
        }  # fmt: skip
    return cases


LOSS_CASES: dict[str, Case] = {
    "hiou: reduction": (lambda: harmonious_iou_loss(B, B, reduction="avg"), ValueError,
                        ("reduction", "'avg'", "'none'", "'mean'", "'sum'")),
    "hiou: reduction None": (lambda: harmonious_iou_loss(B, B, reduction=None), ValueError,
                             ("reduction", "None")),  # type: ignore[arg-type]
    "hiou: reduction list": (lambda: harmonious_iou_loss(B, B, reduction=["sum"]), ValueError,
                             ("reduction", "['sum']")),  # type: ignore[arg-type]
    "hiou: weight shape": (lambda: harmonious_iou_loss(B, B, weight=torch.ones(3, 1)), ValueError,
                           ("weight", "(3,)", "(3, 1)")),
    "hiou: weight scalar": (lambda: harmonious_iou_loss(B, B, weight=S), ValueError,
                            ("weight", "(3,)", "()")),
    "hiou: weight dtype": (lambda: harmonious_iou_loss(B, B, weight=P.double()), TypeError,
                           ("weight", "float32", "float64")),
    "hiou: weight integer": (lambda: harmonious_iou_loss(B, B, weight=P.long()), TypeError,
                             ("weight", "int64")),
    "hiou: weight device": (lambda: harmonious_iou_loss(B, B, weight=P.to(ELSEWHERE)), ValueError,
                            ("weight", HERE, ELSEWHERE)),
    "hiou: weight number": (lambda: harmonious_iou_loss(B, B, weight=2.0), TypeError,
                            ("weight", "Tensor", "float")),  # type: ignore[arg-type]
    "tcorr: shapes": (lambda: tcorr_loss(P, P[:2]), ValueError, ("ious", "scores", "(3,)", "(2,)")),
    "tcorr: broadcast": (lambda: tcorr_loss(P, P[:, None]), ValueError, ("ious", "(3, 1)")),
    "tcorr: dtype": (lambda: tcorr_loss(P, P.double()), TypeError,
                     ("ious", "scores", "float32", "float64")),
    "tcorr: integer": (lambda: tcorr_loss(P.long(), P.long()), TypeError, ("int64",)),
    "tcorr: scores integer": (lambda: tcorr_loss(P.long(), P), TypeError, ("scores", "int64")),
    "tcorr: device": (lambda: tcorr_loss(P, P.to(ELSEWHERE)), ValueError,
                      ("ious", HERE, ELSEWHERE)),
    "tcorr: variant": (lambda: tcorr_loss(P, P, variant="paper"), ValueError,
                       ("variant", "'paper'", "'official'", "'geometric'")),
    "tcorr: reduction": (lambda: tcorr_loss(P, P, reduction="batchmean"), ValueError,
                         ("reduction", "'batchmean'")),
    "tcorr: weight": (lambda: tcorr_loss(P, P, weight=P[:2]), ValueError,
                      ("weight", "(3,)", "(2,)")),
    "tcorr: list": (lambda: tcorr_loss([0.5], P[:1]), TypeError,
                    ("scores", "Tensor", "list")),  # type: ignore[arg-type]
    "hqod: scores shape": (lambda: hqod_loss(B, B, P[:2]), ValueError,
                           ("scores", "pred", "(3,)", "(2,)")),
    "hqod: scores 2-D": (lambda: hqod_loss(B, B, P[:, None]), ValueError, ("scores", "(3, 1)")),
    "hqod: scores dtype": (lambda: hqod_loss(B, B, P.double()), TypeError,
                           ("scores", "float32", "float64")),
    "hqod: scores device": (lambda: hqod_loss(B, B, P.to(ELSEWHERE)), ValueError,
                            ("scores", HERE, ELSEWHERE)),
    "hqod: scores list": (lambda: hqod_loss(B, B, [0.1, 0.2, 0.3]), TypeError,
                          ("scores", "Tensor", "list")),  # type: ignore[arg-type]
    "hqod: reduction": (lambda: hqod_loss(B, B, P, reduction="max"), ValueError,
                        ("reduction", "'max'")),
    "hqod: variant": (lambda: hqod_loss(B, B, P, variant=""), ValueError, ("variant", "''")),
    "hqod: weight": (lambda: hqod_loss(B, B, P, weight=B), ValueError,
                     ("weight", "(3,)", "(3, 4)")),
    "hqod: avg_factor with none": (lambda: hqod_loss(B, B, P, reduction="none", avg_factor=3.0),
                                   ValueError, ("avg_factor", "mean", "'none'")),
    "hqod: avg_factor with sum": (lambda: hqod_loss(B, B, P, reduction="sum", avg_factor=S),
                                  ValueError, ("avg_factor", "mean", "'sum'")),
    "hqod: avg_factor shape": (lambda: hqod_loss(B, B, P, avg_factor=P), ValueError,
                               ("avg_factor", "(3,)")),
    "module: reduction": (lambda: HarmoniousIoULoss(reduction="x"), ValueError,
                          ("reduction", "'x'")),
    "module: tcorr reduction": (lambda: TCorrLoss(reduction="x"), ValueError, ("reduction", "'x'")),
    "module: tcorr variant": (lambda: TCorrLoss(variant="x"), ValueError, ("variant", "'x'")),
    "module: hqod": (lambda: HQODLoss(reduction="x"), ValueError, ("reduction", "'x'")),
    "module: hqod variant": (lambda: HQODLoss(variant="x"), ValueError, ("variant", "'x'")),
    "module: range": (lambda: FakeQuant(7, -8), ValueError, ("quant_min", "7", "-8")),
    "module: alpha": (lambda: HarmoniousIoULoss(alpha="x"), TypeError, ("alpha", "'x'")),
    "module: hqod weight": (lambda: HQODLoss(hiou_weight=None), TypeError, ("hiou_weight", "None")),
    "module: logits": (lambda: TCorrLoss(logits=1), TypeError, ("logits", "a bool", "1")),
    "module: fractional": (lambda: FakeQuant(0, 7.5), TypeError, ("quant_max", "7.5")),
    "module: grad_scale": (lambda: FakeQuant(0, 7, grad_scale="x"), ValueError,
                           ("grad_scale", "'x'")),
}  # fmt: skip


OPTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "hiou": (lambda **options: harmonious_iou_loss(B, B, **options), ("alpha", "gamma")),
    "hqod": (
        lambda **options: hqod_loss(B, B, P, **options),
        ("alpha", "gamma", "hiou_weight", "tcorr_weight"),
    ),
    "tcorr": (lambda **options: tcorr_loss(P, P, **options), ()),
}


def option_cases() -> dict[str, Case]:
    """Options of the losses that are no numbers: strings, and tensors that hope for a gradient."""
    cases: dict[str, Case] = {}
    learned = S.clone().requires_grad_()
    for name, (op, numbers) in OPTIONS.items():
        for option in numbers:
            for value, word in (("much", "'much'"), (None, "NoneType"), (learned, "requires grad")):
                cases[f"{name}: {option} {word}"] = (
                    lambda op=op, option=option, value=value: op(**{option: value}),
                    TypeError, (option, "a number", word),
                )  # fmt: skip
    for name in ("hqod", "tcorr"):
        cases[f"{name}: logits"] = (
            lambda op=OPTIONS[name][0]: op(logits="yes"), TypeError, ("logits", "a bool", "'yes'"),
        )  # fmt: skip
    cases["hqod: avg_factor str"] = (
        lambda: hqod_loss(B, B, P, avg_factor="all"),
        TypeError, ("avg_factor", "a number", "'all'"),
    )  # fmt: skip
    return cases


def quant_cases() -> dict[str, Case]:
    """fake_quant, and fake_quant_foreach with the bad entry in the second place."""

    def foreach(x: Any, s: Any, z: Any = None, **options: Any) -> Any:
        zeros = (
            None if z is None else [torch.zeros_like(z) if isinstance(z, torch.Tensor) else z, z]
        )
        good = X if options.get("ch_axis") is None else X[:, : s.numel()]
        first = S if options.get("ch_axis") is None else C
        options = {name: [0 if name == "quant_min" else 1, value] if "quant" in name else value
                   for name, value in options.items()}  # fmt: skip
        if options.get("ch_axis") not in (None, 1, -2):
            return fake_quant_foreach([x, x], [s, s], **options)
        if zeros is not None:
            zeros[0] = torch.zeros_like(first)
        return fake_quant_foreach([X if first is C else good, x], [first, s], zeros, **options)

    cases: dict[str, Case] = {}
    for name, op in (("fake_quant", fake_quant), ("foreach", foreach)):
        entry = ("entry 1",) if name == "foreach" else ()
        some: dict[str, Case] = {
            "x integer": (lambda op=op: op(X.int(), S, **W4), TypeError,
                          ("x", "floating", "int32")),
            "x complex": (lambda op=op: op(X.cfloat(), S, **W4), TypeError, ("x", "complex64")),
            "x list": (lambda op=op: op([1.0], S, **W4), TypeError, ("x", "Tensor", "list")),
            "x list with axis": (lambda op=op: op([1.0], C, ch_axis=1, **W4), TypeError,
                                 ("x", "Tensor", "list")),
            "scale number": (lambda op=op: op(X, 0.1, **W4), TypeError,
                             ("scale", "Tensor", "float")),
            "scale integer": (lambda op=op: op(X, S.int(), **W4), TypeError, ("scale", "int32")),
            "scale float64": (lambda op=op: op(X, S.double(), **W4), TypeError,
                              ("scale", "float32", "float64")),
            "scale half": (lambda op=op: op(X, S.half(), **W4), TypeError, ("scale", "float16")),
            "scale too long": (lambda op=op: op(X, C, **W4), ValueError,
                               ("scale", "1 value", "got 4")),
            "scale wrong length": (lambda op=op: op(X, C[:3], ch_axis=1, **W4), ValueError,
                                   ("scale", "C = 4", "got 3", "(3, 4, 5)")),
            "scale one for many": (lambda op=op: op(X, S, ch_axis=1, **W4), ValueError,
                                   ("scale", "C = 4", "got 1")),
            "scale empty": (lambda op=op: op(X, C[:0], **W4), ValueError, ("scale", "got 0")),
            "scale device": (lambda op=op: op(X, S.to(ELSEWHERE), **W4), ValueError,
                             ("scale", HERE, ELSEWHERE)),
            "zero point length": (lambda op=op: op(X, S, C, **W4), ValueError,
                                  ("zero_point", "1 value", "got 4")),
            "zero point dtype": (lambda op=op: op(X, S, S.double(), **W4), TypeError,
                                 ("zero_point", "float32", "float64")),
            "zero point complex": (lambda op=op: op(X, S, S.cfloat(), **W4), TypeError,
                                   ("zero_point", "complex64")),
            "zero point device": (lambda op=op: op(X, S, S.to(ELSEWHERE), **W4), ValueError,
                                  ("zero_point", HERE, ELSEWHERE)),
            "zero point int device": (lambda op=op: op(X, S, S.int().to(ELSEWHERE), **W4),
                                      ValueError, ("zero_point", HERE, ELSEWHERE)),
            "zero point number": (lambda op=op: op(X, S, 3, **W4), TypeError,
                                  ("zero_point", "Tensor", "int")),
            "range reversed": (lambda op=op: op(X, S, quant_min=7, quant_max=-8), ValueError,
                               ("quant_min", "quant_max", "7", "-8")),
            "range empty": (lambda op=op: op(X, S, quant_min=3, quant_max=3), ValueError,
                            ("quant_min", "3")),
            "range too wide": (lambda op=op: op(X, S, quant_min=0, quant_max=2**24 + 1), ValueError,
                               ("quant_max", "2**24", str(2**24 + 1))),
            "range fractional": (lambda op=op: op(X, S, quant_min=-8.0, quant_max=7.5), TypeError,
                                 ("quant_m", "float")),
            "axis": (lambda op=op: op(X, C, ch_axis=3, **W4), IndexError,
                     ("ch_axis", "[-3, 2]", "got 3")),
            "negative axis": (lambda op=op: op(X, C, ch_axis=-4, **W4), IndexError,
                              ("ch_axis", "[-3, 2]", "got -4")),
            "axis fractional": (lambda op=op: op(X, C, ch_axis=1.0, **W4), TypeError,
                                ("ch_axis", "float")),
            "axis of a scalar": (lambda op=op: op(S, S, ch_axis=0, **W4), IndexError, ("ch_axis",)),
        }  # fmt: skip
        for what, (call, kind, words) in some.items():
            more = () if name == "fake_quant" or "axis" in what or what == "scale one for many" \
                else entry  # fmt: skip
            cases[f"{name}: {what}"] = (call, kind, (*words, *more))
    for grad_scale in ("LSQ", "auto", ""):
        cases[f"grad_scale {grad_scale!r}"] = (
            lambda g=grad_scale: fake_quant(X, S, grad_scale=g, **W4),
            ValueError, ("grad_scale", repr(grad_scale), "lsq"),
        )  # fmt: skip
    cases["grad_scale list"] = (
        lambda: fake_quant(X, S, grad_scale=[1.0], **W4), TypeError, ("grad_scale", "list"),
    )  # fmt: skip
    return cases


FOREACH_CASES: dict[str, Case] = {
    "scales short": (lambda: fake_quant_foreach([X, X], [S], **W4), ValueError,
                     ("scales", "2", "got 1")),
    "zero_points short": (lambda: fake_quant_foreach([X, X], [S, S], [S], **W4), ValueError,
                          ("zero_points", "2", "got 1")),
    "quant_min short": (lambda: fake_quant_foreach([X, X], [S, S], quant_min=[0], quant_max=7),
                        ValueError, ("quant_min", "2", "got 1")),
    "quant_max long": (lambda: fake_quant_foreach([X], [S], quant_min=0, quant_max=[7, 7]),
                       ValueError, ("quant_max", "1", "got 2")),
    "dtypes differ": (lambda: fake_quant_foreach([X, X.double()], [S, S.double()], **W4), TypeError,
                      ("entry 1", "xs[0]", "float32", "float64")),
    "devices differ": (lambda: fake_quant_foreach([X, X.to(ELSEWHERE)], [S, S.to(ELSEWHERE)], **W4),
                       ValueError, ("entry 1", "xs[0]", HERE, ELSEWHERE)),
    "a zero point is None": (lambda: fake_quant_foreach([X, X], [S, S], [S, None], **W4), TypeError,
                             ("entry 1", "zero_point", "None")),
    "grad_scale": (lambda: fake_quant_foreach([X], [S], grad_scale="no", **W4), ValueError,
                   ("grad_scale", "'no'")),
}  # fmt: skip

CASES = box_cases() | LOSS_CASES | option_cases() | quant_cases() | {
    f"foreach: {name}": case for name, case in FOREACH_CASES.items()
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str) -> None:
    """The type and the words of the exception, the same without gradients and in inference mode."""
    call, kind, words = CASES[name]
    messages = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(kind) as info:
            call()
        assert type(info.value) is kind
        messages.append(str(info.value))
    for word in words:
        assert word in messages[0], f"{word!r} is missing in: {messages[0]}"
    assert "\n" not in messages[0]
    assert len(set(messages)) == 1


def boxes_with(value: float, column: int = 2) -> torch.Tensor:
    boxes = B.clone()
    boxes[1, column] = value
    return boxes


DEBUG_CASES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "iou NaN": (lambda: aligned_box_iou(B, boxes_with(NAN)), ("boxes2", "index 1", "nan")),
    "iou inverted": (lambda: aligned_box_iou(boxes_with(-5), B), ("boxes1", "x1 <= x2", "-5.0")),
    "hiou inf": (lambda: harmonious_iou_loss(boxes_with(INF), B), ("pred", "finite", "inf")),
    "hiou target": (lambda: harmonious_iou_loss(B, boxes_with(-5, 3)), ("target", "y1 <= y2")),
    "hqod pred": (lambda: hqod_loss(boxes_with(-5), B, P), ("pred", "index 1")),
    "hqod target": (lambda: hqod_loss(B, boxes_with(-INF, 0), P), ("target", "-inf")),
    "hqod scores": (lambda: hqod_loss(B, B, P.new_tensor([0, 1, NAN])), ("scores", "index 2")),
    "tcorr scores": (lambda: tcorr_loss(P.new_tensor([NAN]), P[:1]), ("scores", "finite", "nan")),
    "tcorr logits": (
        lambda: tcorr_loss(P.new_tensor([1, 1.7]), P[:2] * 0 + 1),
        ("scores: expected values in [0, 1] (did you mean logits=True?)", "1.7", "index 1"),
    ),
    "hqod logits": (lambda: hqod_loss(B, B, P - 1), ("scores", "did you mean logits=True?")),
    "avg_factor": (
        lambda: hqod_loss(B, B, P, avg_factor=0),
        ("avg_factor: expected a positive finite value, got 0.0",),
    ),
    "tcorr ious": (lambda: tcorr_loss(P[:1], P.new_tensor([INF])), ("ious", "inf")),
    "scale 0": (lambda: fake_quant(X, S * 0, **W4), ("scale", "positive", "0.0")),
    "scale negative": (lambda: fake_quant(X, C.neg(), ch_axis=1, **W4), ("scale", "index 0")),
    "scale NaN": (lambda: fake_quant(X, S * NAN, **W4), ("scale", "nan")),
    "scale inf": (lambda: fake_quant(X, S * INF, **W4), ("scale", "inf")),
    "foreach": (lambda: fake_quant_foreach([X, X], [S, -S], **W4), ("entry 1", "scale", "-0.1")),
    "x NaN": (lambda: fake_quant(X * NAN, S, **W4), ("x: ", "finite", "nan")),
    "zero point": (lambda: fake_quant(X, S, S * NAN, **W4), ("zero_point", "finite", "nan")),
    "zero point above": (
        lambda: fake_quant(X, S, S * 0 + 8, **W4),
        ("zero_point: expected values in [-8, 7]", "8.0"),
    ),
    "zero point below": (
        lambda: fake_quant_foreach([X], [S], [S * 0 - 8.6], **W4),
        ("entry 0", "zero_point: expected values in [-8, 7]", "-8.6"),
    ),
    "weight": (lambda: hqod_loss(B, B, P, weight=P * NAN), ("weight", "finite", "nan")),
}


@pytest.mark.parametrize("name", DEBUG_CASES)
def test_debug(name: str) -> None:
    """Values are looked at only when asked for; good ones pass."""
    call, words = DEBUG_CASES[name]
    call()
    hqod_ops.debug(True)
    with pytest.raises(ValueError) as info:
        call()
    for word in words:
        assert word in str(info.value)
    hqod_ops.debug(False)
    call()


def test_debug_lets_good_input_pass() -> None:
    hqod_ops.debug()
    aligned_box_iou(B, B)
    aligned_box_iou(B[:0], B[:0])
    hqod_loss(B, B, P, logits=True)
    hqod_loss(B, B, P - 1, logits=True, avg_factor=2)
    hqod_loss(B[:0], B[:0], P[:0], avg_factor=P.new_tensor(0))
    tcorr_loss(P, P)
    fake_quant(X, C, ch_axis=1, **W4)
    fake_quant_foreach([X, X], [S, S], **W4)
