"""Results of a real ablation: the committed ones."""

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "imbalance-0.5" / "results.json"


@pytest.fixture
def results() -> dict:
    return json.loads(RESULTS.read_text())
