"""Export to ONNX: what the file holds, and that it computes what the model does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hqod_ops.quant import LSQ, QATConfig, QATLayer, Rule, calibrate, prepare_qat
from hqod_ops.quant.dataflow.producers import place_on_producers
from hqod_ops.quant.export import ExportError, ExportReport, export_onnx
from python_tests.onnx_run import run

pytestmark = pytest.mark.require("onnx", "onnxruntime", "onnxscript")

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

OPSET = {2: 25, 4: 21, 8: 18}
"""The first opset with integers of so many bits."""


def network(groups: int = 2) -> nn.Sequential:
    """All kinds of layers, with what exporters and runtimes like to fuse around them.

    The second convolution has enough weights for the file's size to be about them.
    """
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 256, 3, bias=False),
        nn.GroupNorm(4, 256),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(256, 8, 2, stride=2, groups=groups),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def prepared(
    bits: int, model: nn.Module | None = None, shift: float = 0.0, **settings: Any
) -> nn.Module:
    config = QATConfig(bits, bits, edge_bits=bits, **settings)
    model = prepare_qat(model or network(), config)
    batch = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return calibrate(model, [batch + shift], progress=False)


class Exported(NamedTuple):
    bits: int
    model: nn.Module
    report: ExportReport
    file: Any


def width(bits: int) -> int:
    """Bits of the integer type. Older packages have none of 2 bits."""
    from hqod_ops.quant.export.evaluate import usable_opset

    fits = [width for width, opset in OPSET.items() if width >= bits and opset <= usable_opset()]
    return min(fits)


@pytest.fixture(scope="module", params=[2, 3, 4, 6, 8])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    import onnx

    bits = request.param
    # Every second number of bits with a scale a channel.
    model = prepared(bits, per_channel=bits % 4 == 2)
    with torch.no_grad():  # as training leaves them: no scale is a round number
        for index, parameter in enumerate(model.parameters()):
            parameter.mul_(1 + 0.01 * index)
    path = tmp_path_factory.mktemp("onnx") / f"{bits}.onnx"
    report = export_onnx(model, EXAMPLE, path, target="smallest")
    return Exported(bits, model, report, onnx.load(report.path))


def constants(file: Any) -> dict[str, np.ndarray]:
    from onnx import numpy_helper

    return {entry.name: numpy_helper.to_array(entry) for entry in file.graph.initializer}


def layers(model: nn.Module) -> dict[str, QATLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QATLayer)}


def test_file_has_the_codes_scales_and_zero_points_of_the_model(exported: Exported) -> None:
    stored = constants(exported.file)
    for name, layer in layers(exported.model).items():
        weight, inputs = layer.weight_quantizer, layer.input_quantizer
        assert isinstance(weight, LSQ) and isinstance(inputs, LSQ)
        for key, quantizer in (("weight", weight), ("input", inputs)):
            scale, zero = stored[f"{name}.{key}.scale"], stored[f"{name}.{key}.zero_point"]
            expected = quantizer.effective_scale().detach()
            assert scale.dtype == np.float32
            assert torch.equal(torch.from_numpy(scale.reshape(-1).copy()), expected)
            # Codes of inputs count from 0.
            shift = 2 ** (width(exported.bits) - 1) if quantizer.codes()[0] < 0 else 0
            assert zero.shape == scale.shape
            assert (zero.astype(np.int64) == (shift if key == "input" else 0)).all()
        codes = stored[f"{name}.weight.codes"]
        assert codes.dtype.name == f"int{width(exported.bits)}"
        low, high = weight.codes()
        scale = weight.effective_scale().detach()
        if weight.ch_axis is not None:
            scale = scale.reshape([-1 if i == weight.ch_axis else 1 for i in range(codes.ndim)])
        with torch.no_grad():
            expected_codes = (layer.weight / scale).round().clamp(low, high)
        assert np.array_equal(codes.astype(np.int64), expected_codes.numpy())
        values = torch.from_numpy(codes.astype(np.float32)) * scale
        with torch.no_grad():
            assert torch.equal(values, layer.quantized_weight())


def test_opset_and_types_by_need(exported: Exported) -> None:
    from onnx import TensorProto, checker

    bits = width(exported.bits)
    assert [(entry.domain, entry.version) for entry in exported.file.opset_import] == [
        ("", OPSET[bits])
    ]
    assert exported.report.opset == OPSET[bits]
    assert set(exported.report.storage) == {f"INT{bits}", f"UINT{bits}"}
    assert sum(exported.report.storage.values()) == 2 * len(layers(exported.model))
    checker.check_model(exported.file, full_check=True)
    types = {TensorProto.DataType.Name(t.data_type) for t in exported.file.graph.initializer}
    assert types <= {"FLOAT", "INT64", f"INT{bits}", f"UINT{bits}"}
    values = [*exported.file.graph.value_info, *exported.file.graph.output]
    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    assert not [v.name for v in values if v.type.tensor_type.elem_type in halves]


def test_weights_are_packed(exported: Exported) -> None:
    stored = {entry.name: entry for entry in exported.file.graph.initializer}
    for name, layer in layers(exported.model).items():
        packed = len(stored[f"{name}.weight.codes"].raw_data)
        assert packed == -(-layer.weight.numel() * width(exported.bits) // 8)
    parameters = sum(4 * p.numel() for p in network().parameters())
    assert exported.report.size == exported.report.path.stat().st_size
    # Scales, biases, norms and the graph itself are the rest.
    assert exported.report.size < parameters * width(exported.bits) / 32 + 20_000
    assert abs(exported.report.float_size - parameters) < 20_000


def test_runtime_gives_the_outputs_of_the_model(exported: Exported) -> None:
    report = exported.report
    assert report.evaluator.startswith("onnxruntime") and "without" not in report.evaluator
    assert report.steps <= 1 and report.flipped < 0.001
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = exported.model.eval()(x).numpy()
    (output,) = run(report.path, x)
    # A code or two may be another; that moves an average over many values by far less than 5 %.
    assert np.linalg.norm(output - expected) < 0.05 * np.linalg.norm(expected)
    assert 0 <= report.difference < 0.05 * np.abs(expected).max()
    assert report.output_steps == (None,)


def test_nothing_of_the_trace_is_left(exported: Exported) -> None:
    text = str(exported.file.graph.node) + str(exported.file.metadata_props)
    assert "hqod" not in text and "/python" not in text
    graph = exported.file.graph
    entries = [*graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output]
    assert not any(entry.metadata_props or entry.doc_string for entry in entries)


class Shared(nn.Module):
    """A head on two levels, of which one ends in a quantized convolution's input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        levels = [x, 5 * y, nn.functional.avg_pool2d(x, 2).abs()]
        found = [self.out(self.norm(self.conv(level)).relu()) for level in levels]
        return {"first": found[0], "others": torch.cat([f.flatten(1) for f in found[1:]], 1)}


def test_shared_head_has_one_weight_and_the_scales_of_every_level(tmp_path: Path) -> None:
    import onnx

    torch.manual_seed(0)
    example = (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4))
    model = prepare_qat(Shared(), QATConfig(4, 4, edge_bits=4))
    calibrate(model, [example], forward=lambda m, batch: m(*batch), progress=False)
    report = export_onnx(
        model,
        example,
        tmp_path / "m.onnx",
        input_names=["x", "y"],
        output_names=["a", "b"],
        target="smallest",
    )
    file = onnx.load(report.path)
    stored = constants(file)
    assert [name for name in stored if name.endswith(".codes")] == [
        "conv.weight.codes",
        "out.weight.codes",
    ]
    quantizer = model.get_submodule("conv.input_quantizer")
    assert isinstance(quantizer, LSQ) and quantizer.levels == 3
    for level in range(3):
        scale = stored[f"conv.input.{level}.scale"]
        assert scale == quantizer.effective_scale(level).detach().numpy()
        zero = stored[f"conv.input.{level}.zero_point"]
        assert zero.dtype.name == "uint4" and int(zero) == (8 if quantizer.codes(level)[0] else 0)
    assert [entry.name for entry in file.graph.input] == ["x", "y"]
    assert [entry.name for entry in file.graph.output] == ["a", "b"]
    first, _ = run(report.path, *example)
    with torch.no_grad():
        assert np.allclose(first, model(*example)["first"].numpy(), atol=1e-5)


def mixed(model: nn.Sequential) -> nn.Module:
    """Quantizers with zero points and powers of two, 8-bit and 2-bit types side by side."""
    rules = [
        Rule("3", act_quantizer="minmax", act_options={"symmetric": False}, weight_bits=2),
        Rule("7", act_quantizer="pact", act_bits=8),
        Rule("11", weight_quantizer="dorefa", act_quantizer="tqt", act_bits=2),
    ]
    return prepared(4, model, shift=1.0, act_quantizer="lsq_plus", overrides=rules)


def placed(model: nn.Sequential) -> nn.Module:
    """ReLUs taken in by quantizers at the producers, and all weights quantized together."""
    model = nn.Sequential(*[m for m in model if not isinstance(m, nn.MaxPool2d)])
    prepare_qat(model, QATConfig(4, 4, edge_bits=4), foreach=True)
    assert {entry.absorbed for entry in place_on_producers(model).placed} == {"relu", "relu6"}
    return calibrate(model, [EXAMPLE], progress=False)


@pytest.mark.parametrize("target", ["onnxruntime", "smallest"])
@pytest.mark.parametrize("build", [mixed, placed])
def test_every_quantizer_and_placement(
    build: Callable[..., nn.Module], target: str, tmp_path: Path
) -> None:
    import onnx

    model = build(network())
    report = export_onnx(model, EXAMPLE, tmp_path / "m.onnx", target=target)
    assert report.evaluator.startswith("onnxruntime") and "without" not in report.evaluator
    assert report.steps <= 1
    stored = constants(onnx.load(report.path))
    zeros = {
        name: zero.astype(int) for name, zero in stored.items() if name.endswith(".zero_point")
    }
    for name, zero in zeros.items():
        info = {"uint4": 15, "int4": 8, "uint8": 255, "int8": 128, "uint2": 3, "int2": 2}
        assert (np.abs(zero) <= info[stored[name].dtype.name]).all(), name


def test_an_older_opset_takes_the_next_larger_type(tmp_path: Path) -> None:
    model = prepared(2)
    report = export_onnx(model, EXAMPLE, tmp_path / "m.onnx", opset=18, target="smallest")
    assert report.opset == 18 and set(report.storage) == {"INT8", "UINT8"}
    assert report.steps <= 1
    batch = torch.randn(2, 3, 16, 16) * 3  # beyond the range: the limits must hold without the type
    with torch.no_grad():
        expected = model.eval()(batch).numpy()
    (output,) = run(report.path, batch)
    assert np.linalg.norm(output - expected) < 0.05 * np.linalg.norm(expected)


def test_dynamic_batch(tmp_path: Path) -> None:
    model = prepared(8, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    shapes = ({0: torch.export.Dim("batch")},)
    report = export_onnx(model, EXAMPLE, tmp_path / "m.onnx", dynamic_shapes=shapes)
    (output,) = run(report.path, torch.randn(5, 3, 16, 16))
    assert output.shape == (5, 2, 14, 14)


class Lowering(NamedTuple):
    lowered: Any
    recording: Any
    feeds: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def lowering() -> Lowering:
    """An export up to its verification."""
    from hqod_ops.quant.export.inventory import Inventory
    from hqod_ops.quant.export.lowering import finish, lower
    from hqod_ops.quant.export.record import read_grids, record
    from hqod_ops.quant.export.targets import TARGETS
    from hqod_ops.quant.export.trace import trace

    # ONNX's reference evaluator cannot run a transposed convolution in groups.
    model = prepared(4, network(groups=1)).eval()
    inventory = Inventory(model)
    recording = record(inventory, (EXAMPLE,))
    target = TARGETS["smallest"]
    grids = read_grids(inventory, recording, target, 21)
    lowered = lower(trace(inventory, (EXAMPLE,), grids), grids, target)
    finish(lowered)
    name = lowered.model.graph.inputs[0].name
    return Lowering(lowered, recording, {name: EXAMPLE.numpy()})


def verify(lowering: Lowering, change: Callable[[Any], None] | None = None) -> Any:
    from hqod_ops.quant.export.evaluate import to_bytes
    from hqod_ops.quant.export.verify import verify

    lowered = dataclasses.replace(lowering.lowered, model=lowering.lowered.model.clone())
    if change is not None:
        change(lowered.model.graph)
    return verify(lowered, to_bytes(lowered.model), lowering.recording, lowering.feeds, max_steps=1)


def set_constant(graph: Any, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    import onnx_ir as ir

    value = graph.initializers[name].const_value.numpy()
    graph.initializers[name].const_value = ir.tensor(np.asarray(change(value), value.dtype))


def other_epsilon(graph: Any) -> None:
    import onnx_ir as ir

    node = next(node for node in graph if node.op_type == "BatchNormalization")
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.2)


def one_code(graph: Any) -> None:
    def change(codes: np.ndarray) -> np.ndarray:
        codes = codes.copy()
        codes.flat[0] = 3 if codes.flat[0] != 3 else 2
        return codes

    set_constant(graph, "3.weight.codes", change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_code, r"3\.weight_quantizer: the file has another codes"),
        (lambda g: set_constant(g, "3.input.scale", lambda s: s * 1.0001), "another scale"),
        (lambda g: set_constant(g, "11.input.zero_point", lambda z: z + 1), "another zero_point"),
        (lambda g: set_constant(g, "0.bias", lambda b: b + 0.05), r"3\.input_quantizer: .* codes"),
        (lambda g: set_constant(g, "11.bias", lambda b: b + 0.05), "output .* differ by"),
        (other_epsilon, r"3\.input_quantizer: .* codes"),
    ],
    ids=["code", "scale", "zero point", "bias", "last bias", "epsilon"],
)
def test_verification_sees_what_is_wrong(
    lowering: Lowering, change: Callable[[Any], None], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        verify(lowering, change)


def test_verification_accepts_what_is_right(lowering: Lowering) -> None:
    found = verify(lowering)
    assert found.steps <= 1 and found.flipped < 0.001


def test_reference_evaluator_where_the_runtime_cannot(
    lowering: Lowering, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    class Session:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no kernel for this type")

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.warns(UserWarning, match=r"onnx\.reference .*no kernel for this type"):
        found = verify(lowering)
    assert found.evaluator.startswith("onnx.reference") and found.steps <= 1


@pytest.mark.parametrize("also_exact", [False, True])
def test_a_processor_whose_8_bit_sums_overflow(
    lowering: Lowering, monkeypatch: pytest.MonkeyPatch, also_exact: bool
) -> None:
    """Played by a runtime that gets a code wrong, unless it is asked for exact sums."""
    from hqod_ops.quant.export import evaluate
    from hqod_ops.quant.export import verify as verification

    def evaluator(model: bytes, *, optimized: bool = True, exact_sums: bool = False) -> Any:
        run, problem = evaluate.evaluator(model, optimized=optimized, exact_sums=exact_sums)

        def overflowing(feeds: evaluate.Feeds) -> list[np.ndarray]:
            results = run(feeds)
            if optimized and (also_exact or not exact_sums):
                results[-1] = results[-1] + 1000
            return results

        overflowing.name = run.name  # type: ignore[attr-defined]
        return overflowing, problem

    monkeypatch.setattr(verification, "evaluator", evaluator)
    if also_exact:
        with pytest.raises(ExportError, match="codes of onnxruntime [0-9.]+ differ"):
            verify(lowering)
    else:
        with pytest.warns(UserWarning, match="file is right, .* overflow .*x64quantprecision"):
            found = verify(lowering)
        assert found.evaluator.endswith("with session.x64quantprecision=1") and found.steps <= 1


@pytest.mark.parametrize("per_channel", [False, True])
def test_unsigned_weights(tmp_path: Path, recwarn: Any, per_channel: bool) -> None:
    import onnx

    model = prepared(8, per_channel=per_channel)
    signed = export_onnx(model, EXAMPLE, tmp_path / "signed.onnx")
    recwarn.clear()  # signed weights may overflow here: see above
    unsigned = export_onnx(model, EXAMPLE, tmp_path / "unsigned.onnx", unsigned_weights=True)
    assert not recwarn and unsigned.evaluator.startswith("onnxruntime")
    assert "x64quantprecision" not in unsigned.evaluator
    before, after = (constants(onnx.load(report.path)) for report in (signed, unsigned))
    for name in layers(model):
        codes, zero = (f"{name}.weight.{part}" for part in ("codes", "zero_point"))
        assert after[codes].dtype == after[zero].dtype == np.uint8 and (after[zero] == 128).all()
        assert np.array_equal(after[codes].astype(int) - 128, before[codes].astype(int))
        assert np.array_equal(after[f"{name}.weight.scale"], before[f"{name}.weight.scale"])


def test_unsigned_weights_below_8_bits_stay(tmp_path: Path) -> None:
    model = prepared(4, nn.Sequential(nn.Conv2d(3, 4, 3)))
    path = tmp_path / "m.onnx"
    report = export_onnx(model, EXAMPLE, path, opset=21, unsigned_weights=True, target="smallest")
    assert report.storage["INT4"] >= 1 and "UINT8" not in report.storage


def test_nothing_is_written_when_the_file_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hqod_ops.quant.export import exporter

    def wrong(*args: Any, **kwargs: Any) -> None:
        raise ExportError("wrong")

    monkeypatch.setattr(exporter, "verify", wrong)
    model = prepared(8, nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ExportError, match="wrong"):
        export_onnx(model, EXAMPLE, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_model_stays_as_it_is(exported: Exported) -> None:
    model = exported.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.eval()(EXAMPLE)
    model.train()
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all("forward" not in vars(module) for module in model.modules())
