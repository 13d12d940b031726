"""Public names are those of a checked-in list, each is documented, and every example in a docstring runs."""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch

import baselines
import czsl_heads

LISTED = (Path(__file__).parent / "public_names.txt").read_text().split()
DOORS = ("czsl_heads", "czsl_heads.data", "czsl_heads.functional", "czsl_heads.metrics")
MODULES = sorted(info.name for info in pkgutil.walk_packages(czsl_heads.__path__, "czsl_heads."))
BASELINES = sorted(info.name for info in pkgutil.walk_packages(baselines.__path__, "baselines."))
# Functions and heads that a reader calls need an example; records and errors are shown by what makes them.
WITHOUT_EXAMPLE = {
    "CompositionDataset",
    "DataError",
    "CZSLResult",
    "FeasibilityCurve",
    "GapReport",
    "make_shapes",
    "read_dataset",
}


def public_objects() -> dict[str, object]:
    found = {}
    for door in DOORS:
        module = importlib.import_module(door)
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.ismodule(value):
                found[f"{door}.{name}"] = value
    return found


def test_public_names_are_those_of_the_list() -> None:
    assert sorted(public_objects()) == LISTED


@pytest.mark.parametrize("name", LISTED)
def test_every_public_name_is_documented(name: str) -> None:
    document = inspect.getdoc(public_objects()[name]) or ""
    assert len(document.splitlines()) > 1 or name.endswith("Error")
    if name.rpartition(".")[2] not in WITHOUT_EXAMPLE:
        assert ">>>" in document, f"{name} has no example"


@pytest.mark.parametrize("name", [*MODULES, *BASELINES])
def test_every_public_forward_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    for owner, value in inspect.getmembers(module, inspect.isclass):
        own = value.__module__ == name and not owner.startswith("_")
        if own and "forward" in vars(value):
            assert value.forward.__doc__, f"{name}.{owner}.forward has no docstring"


@pytest.mark.parametrize("name", MODULES)
def test_every_example_runs(name: str) -> None:
    module = importlib.import_module(name)
    torch.manual_seed(0)
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(module, globs={**vars(module), "torch": torch}):
        runner.run(test)
    assert runner.failures == 0
