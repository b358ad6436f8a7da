"""All entries: an op of :mod:`hqod_ops.testing.cases` without any of its own gets a plain one."""

from __future__ import annotations

import torch

from bench import losses, quant
from bench.entry import Entry, Inputs
from hqod_ops.testing.cases import CASES, OpCase, leaves

BOXES, TENSOR = (4096,), (256, 256, 3, 3)


def _plain(case: OpCase) -> Entry:
    variant = case.variants[0]
    shape = BOXES if case.is_loss else TENSOR

    def setup() -> Inputs:
        args = case.make(variant, shape, requires_grad=False, device="cpu")
        for tensor in leaves(args, case.differentiable).values():
            tensor.requires_grad_()
        with torch.no_grad():
            return Inputs(args, torch.ones_like(case.call(args, variant)))

    def ours(**args: object) -> object:
        return case.call(args, variant)

    def eager(**args: object) -> object:
        return case.call_reference(args, variant)

    return Entry(
        name=f"{case.name}/{'x'.join(map(str, shape))}, {variant.name}",
        setup=setup,
        ours=ours,
        peers={"eager": eager},
        compiled=eager,
    )


def all_entries(device: str = "cpu") -> list[Entry]:
    """Every entry of ``"cpu"`` or ``"cuda"``, in the order of the table."""
    if device == "cuda":
        special = [*losses.gpu_entries(), *quant.gpu_entries()]
    else:
        special = [*losses.entries(), *quant.entries()]
    covered = {entry.family for entry in special}
    return [*special, *(_plain(case) for name, case in CASES.items() if name not in covered)]
