"""Several devices: processes share the training, wait for one another, and one of them writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

SCRIPT = """
import sys
from pathlib import Path

from czsl_heads.training.ablate import run_ablation
from czsl_heads.training.config import configure_model

out = Path("out")
options = {"epochs": 1, "batch_size": 24, "condense_epochs": 1, "condense_augment": False}
flags = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "enable_progress_bar": False}
arguments = {"data": sys.argv[1], "options": options, "trainer": flags}
for added in (["vac"], ["vac", "bank"]):
    run_ablation(out, configure_model("csp", align="max", add=added, **arguments))
"""


def test_two_processes_finish_a_model_and_add_to_it(shapes_root: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", str(shapes_root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["rows"][0]["readout"]["bank"]["slots"] == 16
    trained = {path.parent.name: path for path in (tmp_path / "out").glob("seed0/*/training.json")}
    assert trained.keys() == {"max", "vac"}
    readouts = json.loads(trained["vac"].read_text())["budgets"]["best"]["test"]
    assert [*readouts] == ["beta 0.5", "beta 0.5, gamma 0.2, slots 16"]
    assert ended.stderr.count("model vac (rows model)") == 2  # once for each command, by one process
