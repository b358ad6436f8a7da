"""Who may import whom: the rules of docs/design.md, read from the imports themselves."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = {
    "core": set(),
    "quant": {"core"},
    "integrations": {"core", "quant"},
    "detection": {"core"},
    "training": {"core", "quant", "integrations", "detection"},
    "testing": {"core", "quant"},
    "cli": {"core", "quant", "integrations", "detection", "training"},
}
"""What a layer may import besides itself; the core is all that lies in no folder of these names."""

LIGHT = {"core", "quant"}
"""Layers that a bare installation imports."""
ALWAYS_THERE = {"torch", "numpy", "hqod_ops"}

LINES, ROOMS = 500, 16


def modules(root: Path) -> dict[str, Path]:
    """The modules of the package by their dotted names."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((root / "hqod_ops").rglob("*.py"))
    }


def _statements(tree: ast.AST, top: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Imports, and whether they run when the module is imported; not those for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, top
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _statements(node, top and not inside)


def imports(root: Path) -> Iterator[tuple[str, str, bool]]:
    """Module, what it imports, and whether it does so at once; of the package itself, modules."""
    known = modules(root)
    for name, path in known.items():
        for node, top in _statements(ast.parse(path.read_text()), True):
            if isinstance(node, ast.Import):
                yield from ((name, alias.name, top) for alias in node.names)
                continue
            assert node.level == 0, f"{name}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield name, whole if whole in known else str(node.module), top


def layer(module: str) -> str:
    """The layer of a module of the package."""
    first = [*module.split("."), ""][1]
    return first if first in LAYERS else "core"


def forbidden(root: Path) -> list[str]:
    """What breaks a rule."""
    found = []
    for module, other, top in imports(root):
        here, package = layer(module), other.partition(".")[0]
        if package == "hqod_ops":
            there = layer(other)
            if there != here and there not in LAYERS[here]:
                found.append(f"{module} ({here}) imports {other} ({there})")
        elif top and here in LIGHT and package not in ALWAYS_THERE | sys.stdlib_module_names:
            found.append(f"{module} ({here}) imports {other}, which may not be installed")
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups that reach one another: what is left once all that import nothing left are gone."""
    left = {name: set(others) - {name} for name, others in edges.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    return [sorted(left)] if left else []


def test_no_layer_imports_one_above() -> None:
    assert forbidden(ROOT) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("reference", "from hqod_ops.quant import LSQ"),
        ("quant/prepare", "import torchvision"),
        ("quant/prepare", "from hqod_ops.integrations import torchvision"),
        ("detection/evaluation", "def f():\n    from hqod_ops.training import run"),
        ("detection/harmony", "from hqod_ops import training"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, module: str, line: str) -> None:
    """The rules can fail."""
    for path in modules(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    planted = tmp_path / "hqod_ops" / f"{module}.py"
    planted.write_text(f"{planted.read_text()}\n{line}\n")
    broken = forbidden(tmp_path)
    assert len(broken) == 1
    assert broken[0].startswith(f"hqod_ops.{module.replace('/', '.')} ")


def test_no_circles() -> None:
    """Neither between modules nor between folders, whatever is imported when."""
    names: dict[str, set[str]] = defaultdict(set)
    folders: dict[str, set[str]] = defaultdict(set)
    paths = modules(ROOT)
    for module, other, _ in imports(ROOT):
        if other in paths and module not in other:  # a package's face names its modules
            names[module].add(other)
            if paths[other].name == "__init__.py" and module.startswith(f"{other}."):
                names[module].discard(other)
    assert circles(names) == []
    for module, others in names.items():
        here = _wing(paths[module])
        folders[here] |= {_wing(paths[other]) for other in others}
    assert circles(folders) == []


def _wing(path: Path) -> str:
    """The folder of a module; a module that lies beside folders stands for itself."""
    folder = path.parent
    beside = any(child.is_dir() and any(child.glob("*.py")) for child in folder.iterdir())
    return str((path if beside else folder).relative_to(ROOT))


def test_a_private_module_is_of_its_neighbours() -> None:
    """What three folders import has a public name."""
    readers: dict[str, set[Path]] = defaultdict(set)
    paths = modules(ROOT)
    for module, other, _ in imports(ROOT):
        if (
            other in paths
            and paths[other].stem.startswith("_")
            and "__init__" not in paths[other].stem
        ):
            readers[other].add(paths[module].parent)
    assert {name: len(folders) for name, folders in readers.items() if len(folders) > 2} == {}


def test_no_file_and_no_folder_is_too_large() -> None:
    files = [
        *modules(ROOT).values(),
        *(ROOT / "csrc").rglob("*.*"),
        *(ROOT / "python_tests").rglob("*.py"),
    ]
    long = {
        str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text().splitlines())) > LINES
    }
    assert long == {}
    rooms: dict[Path, int] = defaultdict(int)
    for path in files:
        rooms[path.parent] += path.name != "__init__.py"
    assert {str(f.relative_to(ROOT)): n for f, n in rooms.items() if n > ROOMS} == {}
