"""Several devices: processes share the training, wait for one another, and one of them writes."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_two_processes_finish_the_whole_ablation(shapes_root: Path, tmp_path: Path) -> None:
    options = {"epochs": 1, "batch_size": 24, "lora_rank": 1, "condense_epochs": 1, "condense_augment": "false"}
    flags = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "enable_progress_bar": "false"}
    command = [sys.executable, "-m", "czsl_heads.cli", "ablate", "--data", str(shapes_root), "--out", "out"]
    command += [part for name, value in options.items() for part in (f"--options.{name}", str(value))]
    command += [part for name, value in flags.items() for part in (f"--trainer.{name}", str(value))]
    command += ["--preset", "shapes", "--sweep", "gamma"]
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["number"] for row in results["rows"]] == ["1", "1+", "2", "2+", "3", "4", "5", "6"]
    assert [*results["studies"]] == ["gamma"]
    assert ended.stdout.count("wrote results.json") == 1
    assert sorted(path.parent.name for path in (tmp_path / "out").glob("seed0/*/run.json")) == [
        "cls",
        "max",
        "vac",
        "vac-kl",
    ]
