"""The examples in the docstrings run and print what they say; every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import hqod_ops

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules() -> list[str]:
    """The modules of the package that hold public names, by full name."""
    found = [
        module.name
        for module in pkgutil.walk_packages(
            hqod_ops.__path__, "hqod_ops.", onerror=lambda name: None
        )
        if not module.name.startswith(("hqod_ops._register", "hqod_ops._host"))
        and not module.name.endswith("__main__")
    ]
    return ["hqod_ops", *found]


NEEDS = {
    "hqod_ops.detection": ("torchvision", "pycocotools", "sklearn", "matplotlib"),
    "hqod_ops.integrations": ("torchvision",),
    "hqod_ops.integrations.transformers": ("transformers", "scipy"),
    "hqod_ops.integrations.ultralytics": ("ultralytics",),
    "hqod_ops.training": ("torchvision", "pycocotools", "sklearn", "matplotlib", "msgspec", "rich"),
    "hqod_ops.quant.export": ("onnx", "onnxruntime", "onnxscript", "torchvision"),
}


def parameters() -> list[object]:
    found = []
    for name in modules():
        needed = [extra for prefix, extra in NEEDS.items() if name.startswith(prefix)]
        marks = [pytest.mark.require(*extra) for extra in needed]
        found.append(pytest.param(name, marks=marks))
    return found


@pytest.mark.parametrize("name", parameters())
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    report: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("name", [n for n in hqod_ops.__all__ if n != "__version__"])
def test_every_public_name_is_documented(name: str) -> None:
    """A summary, an example; for functions every parameter, what is returned and raised."""
    documented = getattr(hqod_ops, name)
    text = inspect.getdoc(documented)
    assert text and ">>>" in text
    if inspect.isfunction(documented) and name not in ("build_info", "debug"):
        for word in ("Args:", "Returns:", "Raises:", "Gradient:", "Source:", "Example:"):
            assert word in text, f"{name} has no {word}"
        for parameter in inspect.signature(documented).parameters:
            assert f"{parameter} (" in text, f"{name} does not document {parameter}"


def test_functions_and_reference_take_the_same() -> None:
    """The same parameters with the same defaults, so that one can stand in for the other."""
    for name in hqod_ops.__all__:
        documented = getattr(hqod_ops, name)
        twin = getattr(hqod_ops.reference, name, None)
        if inspect.isfunction(documented) and twin is not None:
            ours, theirs = (
                {p.name: p.default for p in inspect.signature(function).parameters.values()}
                for function in (documented, twin)
            )
            assert ours == theirs, name
            assert f"hqod_ops.{name}" in (twin.__doc__ or "")
