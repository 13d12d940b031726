"""A data set small enough to train on in a test, and options to match."""

from pathlib import Path

import pytest

from czsl_heads.data import CompositionDataset, read_dataset
from czsl_heads.training.evaluate import Readout
from czsl_heads.training.options import SACOptions
from czsl_heads.training.plans import readouts_of
from czsl_heads.training.run import train_model


@pytest.fixture(scope="session")
def dataset(shapes_root: Path) -> CompositionDataset:
    return read_dataset(shapes_root)


@pytest.fixture(scope="session")
def options() -> SACOptions:
    return SACOptions(
        epochs=2,
        batch_size=48,
        learning_rate=1e-3,
        prompt_dropout=0.2,
        lora_rank=2,
        lora_dropout=0.1,
        condense_augment=False,
        slots=3,
    )


@pytest.fixture(scope="session")
def flags() -> dict:
    return {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture(scope="session")
def aligned(
    tmp_path_factory: pytest.TempPathFactory, dataset: CompositionDataset, options: SACOptions, flags: dict
) -> Path:
    """A finished run of stage I, with a longer budget beside the best; shared: no test may change it."""
    folder = tmp_path_factory.mktemp("run") / "seed0" / "max"
    train_model(folder, dataset, options, {"aligned": Readout()}, extra_epochs=1, trainer=flags)
    return folder


@pytest.fixture(scope="session")
def condensed(aligned: Path, dataset: CompositionDataset, options: SACOptions, flags: dict) -> Path:
    """A finished run of stage II upon it, scored as rows 4 to 6 are."""
    folder = aligned.parent / "vac-kl"
    readouts = readouts_of(options, "condense")
    train_model(folder, dataset, options, readouts, stage="condense", base=aligned, trainer=flags)
    return folder
