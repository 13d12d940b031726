"""What a stage trains, what it freezes, what it computes once, and by which number it compares epochs."""

import dataclasses
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F

from czsl_heads.data import CompositionDataset
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Method
from czsl_heads.models.recipe import LoRAOptions, build
from czsl_heads.models.sac import Aligned
from czsl_heads.models.saved import load_model
from czsl_heads.training import stage as stage_module
from czsl_heads.training import trainer
from czsl_heads.training.cache import encode_images
from czsl_heads.training.loaders import eval_loader
from czsl_heads.training.options import Options
from czsl_heads.training.stage import Stage

pytestmark = pytest.mark.engine

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


def fit(module: Stage, **flags) -> None:
    with trainer.quiet():
        trainer.testing_trainer({**QUIET, "max_epochs": module.options.extra_epochs, **flags}).fit(module)


def built(dataset: CompositionDataset, options: Options, method: str, *, condenser: bool = False) -> Method:
    torch.manual_seed(7)
    return build(options.recipe(method, "tiny", "max", condenser=condenser), dataset.space)


@pytest.fixture
def model(condensed: Path) -> Condensed:
    return load_model(condensed)


@pytest.fixture(scope="module")
def plain() -> Options:
    """Any method, without adapters and dropout."""
    return Options(epochs=1, batch_size=32)


def test_the_condenser_is_trained_and_the_rest_is_frozen_in_eval_mode(
    model: Condensed, dataset: CompositionDataset, options: Options
) -> None:
    module = Stage(model, dataset, options, seed=0)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {f"model.condenser.{name}" for name, _ in model.condenser.named_parameters()}
    modes = {name: part.training for name, part in model.named_modules()}
    assert not any(mode for name, mode in modes.items() if name.startswith("method"))
    assert all(mode for name, mode in modes.items() if name.startswith("condenser"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(module)
    after = model.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(name.startswith("condenser.") for name in changed)
    assert {name: part.training for name, part in model.named_modules()} == modes


@pytest.mark.parametrize(
    ("augment", "cache", "passes"), [(False, None, "train+val"), (False, False, "all"), (True, None, "val")]
)
def test_images_are_encoded_once_where_nothing_random_stands_before(
    model: Condensed, dataset: CompositionDataset, options: Options, augment: bool, cache: bool | None, passes: str
) -> None:
    chosen = dataclasses.replace(options, condense_augment=augment, cache=cache, condense_epochs=3)
    encode, seen = model.encoder.encode_tokens, []
    model.encoder.encode_tokens = lambda images: (seen.append(len(images)), encode(images))[1]
    fit(Stage(model, dataset, chosen, seed=0))
    train, val = len(dataset.samples["train"]), len(dataset.samples["val"])
    wanted = {"train+val": train + val, "all": 3 * (train + val), "val": 3 * train + val}
    assert sum(seen) == wanted[passes]


@pytest.mark.parametrize("method", ["sac", "csp", "troika"])
def test_a_cache_changes_no_number(dataset: CompositionDataset, method: str) -> None:
    options = Options(epochs=1, batch_size=48, condense_augment=False)
    weights = []
    for cache in (None, False):
        model = built(dataset, options, method, condenser=True)
        fit(Stage(model, dataset, dataclasses.replace(options, cache=cache), seed=3))
        weights.append(model.condenser.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-5, rtol=1e-4)


def test_what_would_not_fit_is_kept_only_if_asked_for(
    model: Condensed, dataset: CompositionDataset, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "CACHE_BYTES", 1000)
    for cache, encoded in ((None, False), (True, True)):
        module = Stage(model, dataset, dataclasses.replace(options, cache=cache, condense_epochs=1), seed=0)
        fit(module, limit_train_batches=1)
        assert bool(module._encoded) == encoded


@torch.no_grad()
def test_encoded_images_are_the_encoders(model: Condensed, dataset: CompositionDataset) -> None:
    pairs = dataset.space.pairs
    texts = model.texts(pairs)
    images = dataset.images("val", model.encoder.transform())
    known = {"texts": texts, "device": torch.device("cpu")}
    encoded = encode_images(model.method, eval_loader(images, 20), **known, limit=None)
    tokens, logits, columns = encoded.__getitems__([(0, 7), (2, 3)])
    of_both = model.encode(torch.stack([images[7][0], images[3][0]]))
    torch.testing.assert_close(tokens, of_both)
    expected = model.method.compare(of_both, texts)[0]
    torch.testing.assert_close(logits.pairs, expected.pairs, atol=1e-4, rtol=1e-4)
    assert columns.tolist() == images.columns[[7, 3]].tolist()
    assert encoded.num_bytes > tokens.nbytes * len(encoded) / 2
    for limit, fits in ((encoded.num_bytes, True), (encoded.num_bytes - 100, False)):
        found = encode_images(model.method, eval_loader(images, 20), **known, limit=limit)
        assert (found is not None) == fits


class FirstStep(lightning.Callback):
    """Keeps the gradients that the first step of the optimiser finds, and the losses that were logged before it."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        named = {name: parameter.grad for name, parameter in pl_module.named_parameters()}
        self.gradients = {name: gradient.clone() for name, gradient in named.items() if gradient is not None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses = {name: float(value) for name, value in trainer.callback_metrics.items()}


def first_step(
    dataset: CompositionDataset, stage: str, micro_batch: int | None, *, method: str = "sac", augment=True, **flags
) -> FirstStep:
    options = Options(
        batch_size=24,
        micro_batch=micro_batch,
        condense_augment=augment,
        joint=stage == "joint",
        lora=LoRAOptions(rank=2),
    )
    model = built(dataset, options, method, condenser=stage != "align")
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):  # of LoRA: while it is zero, nothing reaches what stands before it
            torch.nn.init.normal_(parameter, std=0.1)
    kept = FirstStep()
    fit(Stage(model, dataset, options, seed=2), callbacks=[kept], max_steps=1, limit_val_batches=0, **flags)
    return kept


@pytest.mark.parametrize(
    ("method", "stage", "augment", "losses", "flags"),
    [
        ("sac", "align", True, 5, {"accumulate_grad_batches": 2}),
        ("sac", "condense", False, 6, {}),
        ("sac", "condense", True, 6, {}),
        ("sac", "joint", True, 9, {}),
        ("csp", "joint", True, 5, {}),
    ],
)
def test_parts_of_a_batch_give_the_gradients_and_losses_of_the_whole(
    dataset: CompositionDataset, method: str, stage: str, augment: bool, losses: int, flags: dict
) -> None:
    whole, parts = (first_step(dataset, stage, size, method=method, augment=augment, **flags) for size in (None, 7))
    assert whole.gradients.keys() == parts.gradients.keys()
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(parts.gradients[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-5)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-6)
    assert len(whole.losses) == losses


def test_parts_of_a_batch_keep_to_mixed_precision(dataset: CompositionDataset) -> None:
    whole, parts, exact = (
        first_step(dataset, "joint", size, precision=precision)
        for size, precision in ((None, "bf16-mixed"), (7, "bf16-mixed"), (7, "32-true"))
    )
    for name, gradient in whole.gradients.items():
        assert parts.gradients[name].dtype == gradient.dtype
        rounding = (gradient - exact.gradients[name]).norm()
        assert rounding > 0
        assert (parts.gradients[name] - gradient).norm() <= rounding


def test_texts_are_encoded_once_a_step_and_a_part_as_large_as_the_batch_is_the_batch(
    dataset: CompositionDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = Aligned.texts, []
    monkeypatch.setattr(Aligned, "texts", lambda self, pairs: (calls.append(1), encode(self, pairs))[1])
    whole, *same, _ = (first_step(dataset, "align", size) for size in (None, 24, 1000, 5))
    assert len(calls) == 4
    for parts in same:
        assert all(torch.equal(gradient, parts.gradients[name]) for name, gradient in whole.gradients.items())


@pytest.mark.parametrize(("incomplete_group", "factor"), [("mean", 2.0), ("full", 1.0)])
def test_an_incomplete_group_of_batches_is_weighed_as_asked(
    dataset: CompositionDataset, plain: Options, incomplete_group: str, factor: float
) -> None:
    # Of three batches two make a group, and one is left, whose loss Lightning divides by two.
    options = dataclasses.replace(plain, accumulate=2, incomplete_group=incomplete_group)
    module, plain_losses, ratios = Stage(built(dataset, options, "csp"), dataset, options, seed=0), [], []
    losses, step = module._losses, module.training_step

    def noted(*batch):
        plain_losses.append(losses(*batch))
        return plain_losses[-1]

    def weighed(*batch):
        loss = step(*batch)
        ratios.append((loss / plain_losses[-1]["loss"]).item())
        return loss

    module._losses, module.training_step = noted, weighed
    fit(module, accumulate_grad_batches=2, limit_val_batches=0)
    assert ratios == pytest.approx([1.0, 1.0, factor])


@pytest.mark.parametrize("stays", [False, True])
def test_troikas_loop_stays_in_eval_mode_where_it_is_asked_to(
    dataset: CompositionDataset, plain: Options, stays: bool
) -> None:
    options = dataclasses.replace(plain, model={"adapter_dim": 4, "layers": 1, "stays_in_eval": stays})
    module, modes = Stage(built(dataset, options, "troika"), dataset, options, seed=0), []

    def note(disentangler, inputs) -> None:
        if torch.is_grad_enabled():
            modes.append((module.current_epoch, disentangler.training))

    module.model.attribute_disentangler.register_forward_pre_hook(note)
    fit(module, max_epochs=2, limit_train_batches=1)
    assert modes == [(0, True), (1, not stays)]


def test_epochs_are_compared_by_what_is_asked_for(dataset: CompositionDataset, plain: Options) -> None:
    model = built(dataset, plain, "coop").eval()
    images, columns = next(iter(eval_loader(dataset.images("val", model.encoder.transform()), 48)))
    with torch.no_grad():
        loss = F.cross_entropy(model(images, dataset.space.pairs), columns).item()

    def selected(**changes) -> dict[str, float]:
        module = Stage(model, dataset, dataclasses.replace(plain, eval_batch_size=20, **changes), seed=0)
        checked = trainer.testing_trainer(QUIET)
        with trainer.quiet():
            checked.validate(module, verbose=False)
        return {name: value.item() for name, value in checked.callback_metrics.items()}

    found = selected()
    assert found["val/selected"] == found["val/auc"]
    assert selected(selection_digits=1)["val/selected"] == pytest.approx(round(found["val/auc"], 1)) != found["val/auc"]
    assert selected(selection="loss")["val/selected"] == pytest.approx(-loss, rel=1e-5)
    assert selected(selection="last")["val/selected"] == 0  # the number of the epoch
