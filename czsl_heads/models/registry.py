"""Methods by name: those of this package and those that other packages bring, through one door.

A package adds a method by an entry point of the group ``czsl_heads.methods``. Its name is that of the method, its value
the class, ``package.module:Class``. Presets, if there are any, stand in ``presets/NAME.yaml`` beside the module.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from czsl_heads._checks import check_choice
from czsl_heads.models.method import Method

METHODS = "czsl_heads.methods"


def method_names() -> list[str]:
    """Names of all methods that are installed, sorted."""
    return sorted(_found())


def find_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: No installed package brings such a method, or two do, or its module cannot be imported.
        TypeError: What it brings is no :class:`~czsl_heads.models.method.Method`.

    Example:
        >>> find_method("sac").__name__
        'Aligned'
    """
    entry = _entry(name)
    several = sorted({each.value for each in entry_points(group=METHODS) if each.name == name})
    if len(several) > 1:
        raise ValueError(f"expected one package that brings `method` {name}, got {' and '.join(several)}")
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"expected `method` {name} in {entry.value}, got {error}{_shadow(entry, error)}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise TypeError(f"expected `method` {name} to be a class of Method in {entry.value}, got {found!r}")
    return found


def presets_path(name: str) -> Path:
    """Where the presets of a method stand, if it has any. Errors as :func:`find_method`."""
    find_method(name)  # whose errors are sentences
    spec = find_spec(_entry(name).module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "presets" / f"{name}.yaml"


def _found() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=METHODS)}


def _entry(name: str) -> EntryPoint:
    found = _found()
    check_choice("method", name, sorted(found))
    return found[name]


def _shadow(entry: EntryPoint, error: Exception) -> str:
    """The folder that hides the package of an entry point, as a project's own folder of that name does."""
    top = entry.module.partition(".")[0]
    if isinstance(error, ImportError) and (error.name or top).partition(".")[0] != top:
        return ""  # what is missing is something else, which the package wants
    spec = find_spec(top)
    places = [] if spec is None else [*(spec.submodule_search_locations or [])]
    return f" (`{top}` is {places[0]} here; another folder of that name may hide it)" if places else ""
