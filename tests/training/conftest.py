"""A data set small enough to train on in a test, and options to match."""

from pathlib import Path

import pytest

from czsl_heads.data import CompositionDataset, read_dataset
from czsl_heads.training.options import AlignOptions


@pytest.fixture(scope="session")
def dataset(shapes_root: Path) -> CompositionDataset:
    return read_dataset(shapes_root)


@pytest.fixture(scope="session")
def options() -> AlignOptions:
    return AlignOptions(epochs=2, batch_size=48, learning_rate=1e-3, prompt_dropout=0.2, lora_rank=2, lora_dropout=0.1)


@pytest.fixture(scope="session")
def flags() -> dict:
    return {"accelerator": "cpu", "enable_progress_bar": False}
