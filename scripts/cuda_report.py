#!/usr/bin/env python3
"""What the CUDA kernels need of a device, read from the machine code of the library.

For every kernel and architecture: registers, shared memory, local memory (stack and spills), the
16-byte loads and stores, and how many loads are under way before the first of their results is
used, 16-byte ones where a kernel has such. For the fake-quant kernels the instructions an element,
by class, in the code that works on whole vectors: there an element is rounded once, so elements are
counted by their roundings. It fails where a kernel uses local memory, or where one that is bound by
memory lacks its wide accesses. It needs cuobjdump, of the CUDA toolkit or of the triton package,
and no GPU.

    python scripts/cuda_report.py                   check, and print a table
    python scripts/cuda_report.py --json FILE       write what was found, too
    python scripts/cuda_report.py --compare FILE    fail where an earlier report is out of date, or
                                                    where an element takes a tenth more instructions
    python scripts/cuda_report.py --before FILE     print instructions an element, then and now
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

LIBRARY = Path(__file__).resolve().parent.parent / "hqod_ops" / "lib" / "libhqod_ops_cuda.so"
# A class of instructions: what its mnemonics begin with.
_CLASSES = {
    "memory": ("LD", "ULD", "ST", "RED", "ATOM"),
    "fma": ("FFMA", "FMUL", "FADD", "DFMA", "DMUL", "DADD"),
    "select": ("FSETP", "FSEL", "FMNMX", "DSETP", "DMNMX", "ISETP", "SEL", "PLOP3"),
    "conversion": ("F2", "I2F", "FRND", "HADD2.F32", "PRMT", "IMAD.U32"),
    "other": ("",),
}
_VARYING = {"registers", "elements", *_CLASSES}  # with nvcc
_NARROW = re.compile(r"LDG\.E(?!\S*\.(?:64|128))")
_WIDE = re.compile(r"(LDG|STG)\.E(?:\.[A-Z0-9_]+)*\.128\b")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?\b")


@dataclass
class Kernel:
    """One kernel on one architecture."""

    name: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    local_bytes: int
    wide_loads: int = 0
    wide_stores: int = 0
    loads_under_way: int = 0
    elements: int = 0
    """That the code for whole vectors works on; the instructions that follow are for one."""
    memory: float = 0.0
    fma: float = 0.0
    select: float = 0.0
    conversion: float = 0.0
    other: float = 0.0

    @property
    def instructions(self) -> float:
        """For an element."""
        return sum(getattr(self, name) for name in _CLASSES)


def find_cuobjdump() -> str:
    """The tool's path.

    Raises:
        FileNotFoundError: neither the toolkit nor triton has it.
    """
    found = shutil.which("cuobjdump")
    if found:
        return found
    spec = importlib.util.find_spec("triton")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        candidate = Path(place) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if candidate.exists():
            return str(candidate)
    raise FileNotFoundError("cuobjdump: install the CUDA toolkit, or pip install triton")


def _dump(tool: str, library: Path, *what: str) -> str:
    environment = os.environ | {"PATH": f"{Path(tool).parent}:{os.environ['PATH']}"}  # nvdisasm
    text = subprocess.run(
        [tool, *what, str(library)], check=True, capture_output=True, text=True, env=environment
    ).stdout
    return subprocess.run(
        ["c++filt"], input=text, check=True, capture_output=True, text=True
    ).stdout


def _short(function: str) -> str:
    """FakeQuantKernel<Half, true, 1> from the whole signature."""
    name = re.sub(r"^void hqod::run_kernel<(.*?) ?>\(.*$", r"\1", function.strip())
    return re.sub(r"hqod::cuda::|hqod::", "", name)


def _resources(text: str) -> dict[tuple[str, str], Kernel]:
    kernels, arch, name = {}, "", ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\S+)", line.strip()):
            arch = found[1]
        elif found := re.match(r"Function (.*):$", line.strip()):
            name = _short(found[1])
        elif "REG:" in line and name:
            use = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            kernels[arch, name] = Kernel(
                name, arch, use["REG"], use["SHARED"], use["STACK"], use["LOCAL"]
            )
    return kernels


def _mnemonic(line: str) -> str:
    return re.sub(r"^@!?U?P\w+ ", "", line).partition(" ")[0]


def _goal(line: str) -> int | None:
    """The address that a branch goes to."""
    found = re.search(r"\bBRA\b.*0x([0-9a-f]+)$", line)
    return int(found[1], 16) if found else None


def _blocks(code: list[tuple[int, str]]) -> list[list[str]]:
    """The mnemonics of the straight pieces of code that branches and their targets leave."""
    goals = {goal for _, line in code if (goal := _goal(line)) is not None}
    blocks: list[list[str]] = [[]]
    for address, line in code:
        if address in goals:
            blocks.append([])
        blocks[-1].append(_mnemonic(line))
        if re.search(r"\b(BRA|EXIT|RET|CALL)\b", line):
            blocks.append([])
    return blocks


def _set_instructions(kernel: Kernel, code: list[tuple[int, str]]) -> None:
    """Count where several elements are rounded, and none was loaded alone: there, and in the blocks
    before it that compute for it."""
    counts = dict.fromkeys(_CLASSES, 0)
    before: list[str] = []
    for block in _blocks(code):
        elements = sum(mnemonic.startswith("FRND") for mnemonic in block)
        leaves = any(m.startswith(("EXIT", "CALL", "RET")) for m in block)
        if elements == 1 or leaves or any(map(_NARROW.match, block)):
            before = []
        elif elements == 0:
            computes = any(m.startswith((*_CLASSES["fma"], "HADD2.F32")) for m in block)
            before += block if computes else []
        else:
            kernel.elements += elements
            for m in before + block:
                counts[next(c for c, begins in _CLASSES.items() if m.startswith(begins))] += 1
            before = []
    for name, count in counts.items():
        setattr(kernel, name, round(count / max(kernel.elements, 1), 2))


def _loads_under_way(code: list[tuple[int, str]], load: re.Pattern[str]) -> int:
    """The most such loads of one path whose results no instruction has read yet.

    Where paths meet, the one with more loads goes on; loops are not followed back.
    """
    waiting: dict[int, dict[int, int]] = {}  # address of a branch target: what is under way there
    pending: dict[int, int] | None = {}  # register: the load that it waits for; None: unreachable
    most = 0

    def count(state: dict[int, int] | None) -> int:
        return -1 if state is None else len(set(state.values()))

    for address, line in code:
        if count(waiting.get(address)) > count(pending):
            pending = waiting[address]
        if pending is None:
            continue
        always = not line.startswith("@")
        mnemonic, _, operands = re.sub(r"^@!?U?P\w+ ", "", line).partition(" ")
        goal = _goal(line)
        if goal is not None and goal > address and count(pending) > count(waiting.get(goal)):
            waiting[goal] = dict(pending)
        if mnemonic in ("BRA", "EXIT", "RET") and always and "P" not in operands:
            pending = None
            continue
        parts = operands.split(",")
        stores = mnemonic.startswith(("ST", "RED"))
        for register, pair in _REGISTER.findall(operands if stores else ",".join(parts[1:])):
            for one in (int(register), int(register) + 1) if pair else (int(register),):
                if one in pending:
                    used = pending[one]
                    pending = {r: n for r, n in pending.items() if n != used}
        if load.match(mnemonic):
            first = int(_REGISTER.search(parts[0])[1])
            pending |= {first + i: address for i in range(4 if "128" in mnemonic else 1)}
            most = max(most, count(pending))
    return most


def _read_code(text: str, kernels: dict[tuple[str, str], Kernel]) -> None:
    arch, kernel, code = "", None, []

    def finish() -> None:
        if kernel is None:
            return
        wide = [found[1] for _, line in code if (found := _WIDE.search(line))]
        kernel.wide_loads, kernel.wide_stores = wide.count("LDG"), wide.count("STG")
        load = re.compile(r"LDG\S*\.128\b" if kernel.wide_loads else "LDG")
        kernel.loads_under_way = _loads_under_way(code, load)
        if kernel.name.startswith("FakeQuantKernel"):
            _set_instructions(kernel, code)

    for line in text.splitlines():
        if found := re.match(r"arch = (\S+)", line.strip()):
            arch = found[1]
        elif found := re.match(r"Function : (.*)$", line.strip()):
            finish()
            kernel, code = kernels.get((arch, _short(found[1]))), []
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*(?:&.*|\?.*)?;", line):
            code.append((int(found[1], 16), re.sub(r"\s+", " ", found[2])))
    finish()


MOST_LOCAL = {"FakeQuantKernel": 24}
"""Bytes of local memory that a kernel may use. fake_quant's gets one more block on a multiprocessor
in exchange, which made the backward pass of bfloat16 faster on an H200."""


def local_memory(kernel: Kernel) -> list[str]:
    """Whether a kernel spills."""
    used = kernel.stack_bytes + kernel.local_bytes
    if used <= MOST_LOCAL.get(kernel.name.partition("<")[0], 0):
        return []
    return [f"{kernel.name} on {kernel.arch}: {used} bytes of local memory"]


def problems(kernel: Kernel) -> list[str]:
    """What a kernel does not keep to."""
    found = local_memory(kernel)
    where = f"{kernel.name} on {kernel.arch}"
    least = 2  # several loads before the first use of one, stores as wide
    if kernel.name.startswith("FakeQuantKernel"):
        if kernel.loads_under_way < least:
            found.append(f"{where}: {kernel.loads_under_way} wide loads under way, not {least}")
        if kernel.wide_stores < least:
            found.append(f"{where}: {kernel.wide_stores} wide stores, not {least}")
    boxes = re.match(r"LossKernel<(?!TCorr)\w+<float", kernel.name)  # all but those without any
    if boxes and kernel.loads_under_way < least:
        found.append(f"{where}: {kernel.loads_under_way} boxes under way, not {least}")
    return found


def report(library: Path) -> tuple[list[Kernel], list[str]]:
    """All kernels of a library, by name and architecture, and the architectures that are newer than
    cuobjdump: what they need is known, their code is not."""
    tool = find_cuobjdump()
    kernels = _resources(_dump(tool, library, "-res-usage"))
    unread = []
    for arch in sorted({kernel.arch for kernel in kernels.values()}):
        try:
            text = _dump(tool, library, "-arch", arch, "-sass")
        except subprocess.CalledProcessError as error:
            if "is not defined for option" not in error.stdout + error.stderr:
                raise
            unread.append(arch)
        else:
            _read_code(text, kernels)
    return sorted(
        kernels.values(), key=lambda kernel: (kernel.name, int(kernel.arch.partition("_")[2]))
    ), unread


def table(kernels: list[Kernel]) -> str:
    """A line for each kernel: its range over the architectures."""
    head = (
        "| kernel | registers | shared bytes | local bytes | 16-byte loads | under way | stores "
        "| instructions an element |"
    )
    lines = [head, "| --- |" + " ---: |" * 7]
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        same = [kernel for kernel in kernels if kernel.name == name]

        def span(field: str, same: list[Kernel] = same) -> str:
            values = [getattr(kernel, field) for kernel in same]
            low, high = (f"{value:.3g}" for value in (min(values), max(values)))
            return low if low == high else f"{low} to {high}"

        shown = ["registers", "shared_bytes", "local_bytes", "wide_loads", "loads_under_way"]
        shown += ["wide_stores", "instructions"]
        lines.append(f"| {name} | " + " | ".join(map(span, shown)) + " |")
    return "\n".join(lines)


def elements_table(kernels: list[Kernel], before: list[Kernel] | None = None) -> str:
    """Instructions an element by class, registers and loads under way: a line for each fake-quant
    kernel and architecture, with those of an earlier report before them."""
    earlier = {(kernel.name, kernel.arch): kernel for kernel in before or []}
    columns = ["instructions", *_CLASSES, "registers", "loads_under_way"]
    lines = ["| kernel | architecture | " + " | ".join(columns) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(columns))
    for kernel in kernels:
        if not kernel.elements:
            continue
        cells = []
        for column in columns:
            both = (earlier.get((kernel.name, kernel.arch)), kernel)
            cells.append(" -> ".join(f"{getattr(k, column):.3g}" for k in both if k is not None))
        lines.append(f"| {kernel.name} | {kernel.arch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_json(kernels: list[Kernel]) -> str:
    """A line for each kernel and architecture."""
    columns = [field.name for field in fields(Kernel)]
    rows = ",\n".join(f"  {json.dumps(list(astuple(kernel)))}" for kernel in kernels)
    return f'{{\n "columns": {json.dumps(columns)},\n "kernels": [\n{rows}\n ]\n}}\n'


def read_json(path: Path) -> list[Kernel]:
    """An earlier report."""
    earlier = json.loads(path.read_text())
    return [Kernel(**dict(zip(earlier["columns"], row, strict=True))) for row in earlier["kernels"]]


def differences(kernels: list[Kernel], path: Path, unread: list[str]) -> list[str]:
    """How kernels differ from an earlier report, but for what varies with nvcc: registers, and
    instructions unless they are a tenth more. Not those of architectures that were not read."""
    old_kernels = {(k.name, k.arch): k for k in read_json(path) if k.arch not in unread}
    old = {key: asdict(kernel) for key, kernel in old_kernels.items()}
    new = {(kernel.name, kernel.arch): asdict(kernel) for kernel in kernels}
    found = [f"{name} on {arch}: not in {path}" for name, arch in new.keys() - old.keys()]
    found += [f"{name} on {arch}: only in {path}" for name, arch in old.keys() - new.keys()]
    for key in new.keys() & old.keys():
        for column in new[key].keys() - _VARYING:
            now, before = new[key][column], old[key][column]
            if now != before:
                found.append(f"{key[0]} on {key[1]}: {column} {now}, but {before} in {path}")
    for kernel in kernels:
        earlier = old_kernels.get((kernel.name, kernel.arch))
        if earlier and kernel.instructions > 1.1 * earlier.instructions:
            found.append(
                f"{kernel.name} on {kernel.arch}: {kernel.instructions:.1f} instructions an "
                f"element, but {earlier.instructions:.1f} in {path}"
            )
    return sorted(found)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY)
    parser.add_argument("--json", type=Path, help="write the findings to this file")
    parser.add_argument("--arch", nargs="+", help="fail unless these, and no others, are there")
    parser.add_argument(
        "--compare", type=Path, metavar="JSON", help="fail where an earlier report is out of date"
    )
    parser.add_argument(
        "--before", type=Path, metavar="JSON", help="print instructions an element, then and now"
    )
    options = parser.parse_args()
    if not options.library.exists():
        print(f"error: {options.library} does not exist: build with nvcc at hand", file=sys.stderr)
        return 2
    try:
        everything, unread = report(options.library)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    kernels = [kernel for kernel in everything if kernel.arch not in unread]
    print(table(kernels))
    print()
    print(elements_table(kernels, options.before and read_json(options.before)))
    found = [problem for kernel in kernels for problem in problems(kernel)]
    found += [problem for k in everything if k.arch in unread for problem in local_memory(k)]
    archs = sorted({kernel.arch for kernel in everything})
    if unread:
        print(f"{', '.join(unread)}: newer than cuobjdump, which reads no code of it")
    if not kernels:
        found.append("no kernel found")
    if options.arch and sorted(options.arch) != archs:
        found.append(f"architectures: expected {sorted(options.arch)}, got {archs}")
    if options.compare:
        found += differences(kernels, options.compare, unread)
    if options.json:
        options.json.write_text(as_json(kernels))
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{len(everything)} kernels for {', '.join(archs)}: {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
