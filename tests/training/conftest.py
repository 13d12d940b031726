"""A data set small enough to train on in a test, options to match, and two trained models."""

from pathlib import Path

import pytest

from czsl_heads.data import CompositionDataset, read_dataset
from czsl_heads.models.recipe import BankOptions, LoRAOptions
from czsl_heads.training.options import Options
from czsl_heads.training.rows import BankPlan, Readout
from czsl_heads.training.train import train_model


@pytest.fixture(scope="session")
def dataset(shapes_root: Path) -> CompositionDataset:
    return read_dataset(shapes_root)


@pytest.fixture(scope="session")
def options() -> Options:
    return Options(
        epochs=2,
        batch_size=48,
        learning_rate=1e-3,
        condense_augment=False,
        lora=LoRAOptions(rank=2, dropout=0.1),
        bank=BankOptions(slots=3),
        eval_batch_size=20,  # not a divisor of the number of images
        model={"dropout": 0.2},
    )


@pytest.fixture(scope="session")
def flags() -> dict:
    return {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture(scope="session")
def readouts() -> dict[str, Readout]:
    """Ways to score a model with a condenser."""
    plan = BankPlan(3)
    return {
        "alone": Readout(),
        "probabilities": Readout(probabilities=True),
        "fused": Readout(0.5),
        "bank": Readout(0.5, 0.5, plan),
        "texts": Readout(0.4, 0.6, plan._replace(texts=True)),
        "adapted": Readout(0.4, 0.6, plan._replace(texts=True, updates=True)),
        "one slot": Readout(0.4, 0.6, BankPlan(1)),
    }


@pytest.fixture(scope="session")
def aligned(
    tmp_path_factory: pytest.TempPathFactory, dataset: CompositionDataset, options: Options, flags: dict
) -> Path:
    """The folder of SAC's stage I, trained, with a longer budget beside the best; shared: no test may change it."""
    folder = tmp_path_factory.mktemp("run") / "seed0" / "max"
    recipe = options.recipe("sac", "tiny", "max")
    train_model(folder, dataset, recipe, options, {"alone": Readout()}, extra_epochs=1, trainer=flags)
    return folder


@pytest.fixture(scope="session")
def condensed(
    aligned: Path, dataset: CompositionDataset, options: Options, readouts: dict[str, Readout], flags: dict
) -> Path:
    """The folder of stage II upon it, with a bank."""
    folder = aligned.parent / "vac"
    recipe = options.recipe("sac", "tiny", "max", condenser=True)
    train_model(folder, dataset, recipe, options, readouts, base=aligned, trainer=flags)
    return folder
