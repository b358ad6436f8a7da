"""Results as tables: in the terminal with rich where it is installed, else as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OURS = "ours"
PEERS = (
    *("eager", "compile", "torch", "torchvision GIoU", "loop of ours"),
    *("empty op", "torch.neg", "clone"),
)
"""The columns of ratios, in this order, each only where a table has values for it."""


@dataclass(frozen=True)
class Table:
    """Cells as text; missed marks the cells (row, column) that did not reach their goal."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    missed: frozenset[tuple[int, int]] = frozenset()


def _time(microseconds: float) -> str:
    if microseconds >= 1e4:
        return f"{microseconds / 1e3:.1f} ms"
    digits = 0 if microseconds >= 100 else 1
    return f"{microseconds:.{digits}f} µs"


def _ratio(value: float) -> str:
    digits = 0 if value >= 9.95 else 1 if value >= 1.95 else 2
    return f"{value:.{digits}f}x"


def _families(blocks: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for block in blocks:
        grouped.setdefault(block["name"].partition("/")[0], []).append(block)
    return grouped


def _speed(family: str, blocks: list[dict[str, Any]]) -> Table:
    peers = [peer for peer in PEERS if any(peer in block["ratio"] for block in blocks)]
    with_copy = any("copy_fraction" in block for block in blocks)
    setting = "timing" if "timing" in blocks[0] else "threads"
    columns = ["size", "phase", setting, OURS, "p20 to p80", *peers]
    columns += ["of copy rate"] if with_copy else []
    rows, missed = [], set()
    for block in blocks:
        ours, goals = block["us"][OURS], block["goals"]
        row = [block["name"].partition("/")[2], block["phase"], str(block[setting])]
        row += [_time(ours["median"]), f"{_time(ours['p20'])} to {_time(ours['p80'])}"]
        for peer in peers:
            ratio = block["ratio"].get(peer)
            if ratio and ratio["median"] < goals.get(peer, 0):
                missed.add((len(rows), len(row)))
            row.append(_ratio(ratio["median"]) if ratio else "")
        if with_copy:
            fraction = block.get("copy_fraction")
            if fraction and block["ratio"]["copy_"]["median"] < goals.get("copy_", 0):
                missed.add((len(rows), len(row)))
            row.append(f"{fraction['median']:.2f}" if fraction else "")
        rows.append(row)
    return Table(f"{family}: time, and peer ÷ ours", columns, rows, frozenset(missed))


def _memory(family: str, blocks: list[dict[str, Any]]) -> Table | None:
    blocks = [block for block in blocks if "peak_bytes" in block]
    if not blocks:
        return None
    names = [n for n in (OURS, *PEERS) if any(n in block["peak_bytes"] for block in blocks)]
    rows = []
    for block in blocks:
        unit, size = block["memory_unit"]
        peaks = [block["peak_bytes"].get(name) for name in names]
        cells = ["" if peak is None else f"{peak / size:.3g}" for peak in peaks]
        rows.append([block["name"].partition("/")[2], unit, *cells])
    return Table(f"{family}: peak memory of forward + backward", ["size", "unit", *names], rows)


def tables(result: dict[str, Any]) -> list[Table]:
    """The tables of a result file: speed and memory of every family."""
    made: list[Table | None] = []
    for family, blocks in _families(result["blocks"]).items():
        made += [_speed(family, blocks), _memory(family, blocks)]
    return [table for table in made if table is not None]


def comparison(regressions: list[dict[str, Any]]) -> Table:
    """What :func:`bench.compare.regressions` found."""
    columns = ["entry", "phase", "threads or timing", "what", "old", "new", "verdict"]
    rows = [
        [
            *(found["name"], found["phase"], found["setting"], found["what"]),
            *(f"{found['old']:.4g}", f"{found['new']:.4g}"),
            "worse" if found["clear"] else "worse, within noise",
        ]
        for found in regressions
    ]
    return Table("Worse by more than 5 %", columns, rows)


def head(result: dict[str, Any]) -> str:
    """What was measured where, and whether the machine was busy with something else."""
    m = result["machine"]
    if "driver" in m:
        return (
            f"{m['device']}, driver {m['driver']}, torch {m['torch']}, hqod_ops {m['hqod_ops']}"
            f" ({m['backend']}) at {m['commit']}, {m['date'][:10]}"
        )
    settings = f"{m['clock']} time, memory {m['malloc']}"
    if m["load"] > 0.5 * m["cores"]:
        settings += f"\nThe machine was busy (load {m['load']}): times and ratios are off."
    return (
        f"{m['device']}, {m['cores']} cores, torch {m['torch']}, hqod_ops {m['hqod_ops']}"
        f" ({m['backend']}, {m['isa']}) at {m['commit']}, {m['date'][:10]}, {settings}"
    )


def markdown(table: Table) -> str:
    """A table for a README."""
    marked = [
        [f"{cell} (below goal)" if (i, j) in table.missed else cell for j, cell in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    words = ("size", "entry", "phase", "timing", "unit", "what", "verdict")
    rule = ["---" if name in words else "---:" for name in table.columns]
    lines = [f"| {' | '.join(cells)} |" for cells in (table.columns, rule, *marked)]
    return "\n".join([f"**{table.title}**", "", *lines, ""])


def show(table: Table) -> None:
    """Print for a reader at a terminal."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        print(markdown(table))
        return
    rich = RichTable(title=table.title, title_justify="left", caption_justify="left")
    for index, name in enumerate(table.columns):
        rich.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for i, row in enumerate(table.rows):
        cells = (f"[red]{c} <[/red]" if (i, j) in table.missed else c for j, c in enumerate(row))
        rich.add_row(*cells)
    console = Console()
    # A file or a pipe has no width to fit into.
    console = console if console.is_terminal else Console(width=200)
    console.print(rich)
