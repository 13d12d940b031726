"""A method and an encoder of another package: the file of docs/add_a_method.md, installed, and run by every command."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine
PAGE = Path(__file__).parents[1] / "docs" / "add_a_method.md"
PRESETS = """
shapes:
  guess: {epochs: 1, batch_size: 48, learning_rate: 1.0e-3, condense_augment: false}
"""
ENCODER = """
from czsl_heads import wrap


def load(tag):
    return wrap(tag or "tiny")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package in it, put there by pip from a wheel."""
    folder = tmp_path_factory.mktemp("stranger")
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    entries = "[czsl_heads.methods]\noffsets = offsets:Offsets\n\n[czsl_heads.encoders]\nmy-clip = my_clip:load\n"
    files = {
        "offsets.py": block,
        "my_clip.py": ENCODER,
        "presets/offsets.yaml": PRESETS,
        "stranger-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n",
        "stranger-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "stranger-1.0.dist-info/entry_points.txt": entries,
    }
    record = [f"{name},sha256={_digest(text)},{len(text.encode())}" for name, text in files.items()]
    files["stranger-1.0.dist-info/RECORD"] = "\n".join([*record, "stranger-1.0.dist-info/RECORD,,"])
    wheel = folder / "stranger-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*command, str(folder / "site"), str(wheel)], check=True, capture_output=True, timeout=120)
    return folder / "site"


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


def run(installed: Path, cwd: Path, *command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(installed)}
    python = [sys.executable, *command]
    done = subprocess.run(python, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_method_and_an_encoder_of_another_package_have_every_command(
    installed: Path, shapes_root: Path, tmp_path: Path
) -> None:
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--options.condense_epochs=1"]
    czsl = ["-m", "czsl_heads.cli"]
    chosen = ["--method=offsets", "--encoder=my-clip", "--preset=shapes", f"--data={shapes_root}", "--out=out"]
    shown = run(installed, tmp_path, *czsl, "ablate", *chosen, "--add=vac", "--add=bank", *quiet)
    assert "Paired differences" not in shown
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [row["key"] for row in results["rows"]] == ["cls", "max", "topk", "probs", "vac", "bank", "adapted"]
    assert results["sources"]["learning_rate"] == "guess"
    words = 24 * 96  # a vector for each primitive, and nothing else
    assert results["rows"][0]["trainable_parameters"] == words

    image = str(next((shapes_root / "images").glob("*/test_*.png")))
    run(installed, tmp_path, *czsl, "report", "out", "--images", "1")
    assert "bank" in run(installed, tmp_path, *czsl, "predict", image, "--run", "out", "--top", "1")
    script = f"import czsl_heads; print(czsl_heads.load('out').predict({image!r}, topk=1)[0][0])"
    assert "Prediction(attribute=" in run(installed, tmp_path, "-c", script)


def test_a_method_that_is_not_installed_here_is_named(tmp_path: Path) -> None:
    script = "from czsl_heads.models.registry import find_method; find_method('offsets')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "expected `method` to be one of clip, coop, csp, eva, sac, troika, got 'offsets'" in done.stderr
