"""Imports point down only: the architecture of docs/design.md, read off the code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"czsl_heads._checks", "czsl_heads._files", "czsl_heads._numbers"},
    {"czsl_heads._complaints", "czsl_heads._sealed"},
    {"czsl_heads.space", "czsl_heads.functional"},
    {"czsl_heads.heads", "czsl_heads.metrics", "czsl_heads.encoders"},
    {"czsl_heads.adapters", "czsl_heads.prompts", "czsl_heads.data"},
    {"czsl_heads.models"},
    {"czsl_heads.training", "czsl_heads.report"},
    {"czsl_heads.cli"},
    {"baselines"},
    {"benchmarks"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FILES = sorted(path for folder in ("czsl_heads", "baselines", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "czsl_heads" else parts[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def upward_imports(source: str, module: str) -> list[str]:
    """Imports of a higher layer, or of another room of the same layer, wherever in the file they stand."""
    own = room_of(module)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: expected absolute imports"
            # `from czsl_heads import data` names a room by its last part
            names = [
                f"{node.module}.{alias.name}" if node.module == "czsl_heads" else node.module for alias in node.names
            ]
        else:
            continue
        for name in names:
            room = room_of(name)
            if room in LEVEL and room != own and LEVEL[room] >= LEVEL[own]:
                found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    module = module_of(path)
    if module == "czsl_heads":
        return  # the door of the package: it names all rooms
    assert room_of(module) in LEVEL, f"{module} is in no layer"
    assert upward_imports(path.read_text(), module) == []


@pytest.mark.parametrize(
    "source",
    [
        "import czsl_heads.training.train",
        "from czsl_heads.models.sac import SAC",
        "def late():\n    from czsl_heads import data",
        "from czsl_heads.metrics.czsl_score import CZSLScore",
    ],
)
def test_an_upward_or_sideward_import_is_found(source: str) -> None:
    assert upward_imports(source, "czsl_heads.heads.sparse_align")
