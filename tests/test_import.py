"""What `import czsl_heads` loads, and what it does not."""

import subprocess
import sys

import pytest

HEAVY = ["open_clip", "torchvision", "torchmetrics", "lightning", "matplotlib", "PIL", "jsonargparse", "transformers"]
ALLOWED = {"czsl_heads", "torch", "einops", "numpy"}


def loaded_after(code: str) -> set[str]:
    """Top-level modules that ``code`` adds to a fresh process in which torch, numpy and einops are loaded."""
    script = (
        "import sys, torch, numpy, einops\n"
        "before = set(sys.modules)\n"
        f"{code}\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_torch_einops_and_numpy_only() -> None:
    new = loaded_after("import czsl_heads")
    third_party = {name for name in new if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert third_party <= ALLOWED
    assert not third_party & set(HEAVY)


@pytest.mark.parametrize(
    ("name", "module"), [("wrap", "open_clip"), ("metrics.CZSLScore", "torchmetrics"), ("data.read_dataset", "PIL")]
)
def test_a_name_loads_what_it_needs_on_first_use(name: str, module: str) -> None:
    code = f"import czsl_heads; czsl_heads.{name}" + ("('tiny')" if name == "wrap" else "")
    new = loaded_after(code)
    assert module in new
    assert "lightning" not in new


def test_an_unknown_name_raises() -> None:
    import czsl_heads

    with pytest.raises(AttributeError, match="nonsense"):
        _ = czsl_heads.nonsense
    assert set(czsl_heads.__all__) <= set(dir(czsl_heads))
