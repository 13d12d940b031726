"""What a stage trains, what it freezes, and what it computes once."""

import dataclasses
from pathlib import Path

import lightning
import pytest
import torch

from czsl_heads.data import CompositionDataset
from czsl_heads.models.sac import SAC
from czsl_heads.training import stage as stage_module
from czsl_heads.training.cache import encode_images
from czsl_heads.training.loaders import eval_loader
from czsl_heads.training.options import SACOptions
from czsl_heads.training.run import build_sac, load_run
from czsl_heads.training.stage import Stage
from czsl_heads.training.trainer import quiet


def fit(module: Stage, **flags) -> None:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **({"max_epochs": module.options.extra_epochs} | flags),
    )
    with quiet():
        trainer.fit(module)


class Counted:
    """Counts the images that pass an encoder."""

    def __init__(self, sac) -> None:
        self.images = 0
        encode = sac.encoder.encode_tokens

        def counted(images):
            self.images += len(images)
            return encode(images)

        sac.encoder.encode_tokens = counted


def test_the_condenser_is_trained_and_the_rest_is_frozen_in_eval_mode(
    condensed: Path, dataset: CompositionDataset, options: SACOptions
) -> None:
    module = Stage(load_run(condensed), dataset, options, stage="condense", seed=0)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {f"sac.condenser.{name}" for name, _ in module.sac.condenser.named_parameters()}
    modes = {name: part.training for name, part in module.sac.named_modules()}
    assert all(mode == name.startswith("condenser") for name, mode in modes.items())
    before = {name: tensor.clone() for name, tensor in module.sac.state_dict().items()}
    fit(module)
    after = module.sac.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(name.startswith("condenser.") for name in changed)
    assert {name: part.training for name, part in module.sac.named_modules()} == modes


@pytest.mark.parametrize(
    ("augment", "cache", "passes"), [(False, None, "train+val"), (False, False, "all"), (True, None, "val")]
)
def test_images_are_encoded_once_where_nothing_random_stands_before(
    condensed: Path, dataset: CompositionDataset, options: SACOptions, augment: bool, cache: bool | None, passes: str
) -> None:
    chosen = dataclasses.replace(options, condense_augment=augment, cache=cache, condense_epochs=3)
    sac = load_run(condensed)
    counted = Counted(sac)
    fit(Stage(sac, dataset, chosen, stage="condense", seed=0))
    train, val = len(dataset.samples["train"]), len(dataset.samples["val"])
    wanted = {"train+val": train + val, "all": 3 * (train + val), "val": 3 * train + val}
    assert counted.images == wanted[passes]


def test_a_cache_changes_no_number(condensed: Path, dataset: CompositionDataset, options: SACOptions) -> None:
    weights = []
    for cache in (None, False):
        torch.manual_seed(5)
        sac = load_run(condensed)
        fit(Stage(sac, dataset, dataclasses.replace(options, cache=cache), stage="condense", seed=3))
        weights.append(sac.condenser.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-5, rtol=1e-4)


def test_what_would_not_fit_is_kept_only_if_asked_for(
    condensed: Path, dataset: CompositionDataset, options: SACOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "CACHE_BYTES", 1000)
    for cache, encoded in ((None, False), (True, True)):
        module = Stage(
            load_run(condensed), dataset, dataclasses.replace(options, cache=cache), stage="condense", seed=0
        )
        fit(module)
        assert bool(module._encoded) == encoded


@torch.no_grad()
def test_encoded_images_are_the_encoders(condensed: Path, dataset: CompositionDataset, options: SACOptions) -> None:
    sac = load_run(condensed)
    texts = sac.texts(dataset.space)
    images = dataset.images("val", sac.encoder.transform())
    loader = eval_loader(images, dataclasses.replace(options, eval_batch_size=20))
    encoded = encode_images(sac, loader, texts, device=torch.device("cpu"), limit=None)
    tokens, logits, columns = encoded.__getitems__([(0, 7), (2, 3)])
    out = sac(torch.stack([images[7][0], images[3][0]]), texts)
    torch.testing.assert_close(tokens, out.tokens)
    torch.testing.assert_close(logits.pairs, out.sa.pairs, atol=1e-4, rtol=1e-4)
    assert columns.tolist() == images.columns[[7, 3]].tolist()
    assert encoded.num_bytes > tokens.nbytes * len(encoded) / 2
    exact = encode_images(sac, loader, texts, device=torch.device("cpu"), limit=encoded.num_bytes)
    assert exact is not None
    assert encode_images(sac, loader, texts, device=torch.device("cpu"), limit=encoded.num_bytes - 100) is None


class FirstStep(lightning.Callback):
    """Keeps the gradients that the first step of the optimiser finds, and the losses that were logged before it."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        named = {name: parameter.grad for name, parameter in pl_module.named_parameters()}
        self.gradients = {name: gradient.clone() for name, gradient in named.items() if gradient is not None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses = {name: float(value) for name, value in trainer.callback_metrics.items()}


def first_step(
    dataset: CompositionDataset, options: SACOptions, stage: str, micro_batch: int | None, **flags
) -> FirstStep:
    options = dataclasses.replace(options, prompt_dropout=0.0, lora_dropout=0.0, micro_batch=micro_batch)
    torch.manual_seed(7)
    sac = build_sac("tiny", dataset.space, options, condenser=stage != "align")
    for name, parameter in sac.named_parameters():
        if name.endswith(".b"):  # of LoRA: while it is zero, nothing reaches what stands before it
            torch.nn.init.normal_(parameter, std=0.1)
    kept = FirstStep()
    fit(Stage(sac, dataset, options, stage=stage, seed=2), callbacks=[kept], max_steps=1, limit_val_batches=0, **flags)
    return kept


@pytest.mark.parametrize(
    ("stage", "augment", "flags"),
    [
        ("align", True, {"accumulate_grad_batches": 2}),
        ("condense", False, {}),
        ("condense", True, {}),
        ("joint", True, {}),
    ],
)
def test_parts_of_a_batch_give_the_gradients_and_losses_of_the_whole(
    dataset: CompositionDataset, options: SACOptions, stage: str, augment: bool, flags: dict
) -> None:
    options = dataclasses.replace(options, condense_augment=augment, batch_size=24)
    whole = first_step(dataset, options, stage, None, **flags)
    parts = first_step(dataset, options, stage, 7, **flags)
    assert whole.gradients.keys() == parts.gradients.keys()
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(parts.gradients[name], gradient, atol=1e-6 * float(gradient.abs().max()), rtol=1e-6)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-6)
    assert len(whole.losses) == {"align": 5, "condense": 6, "joint": 9}[stage]


@pytest.mark.parametrize("micro_batch", [24, 1000])
def test_a_part_as_large_as_the_batch_is_the_batch(
    dataset: CompositionDataset, options: SACOptions, micro_batch: int
) -> None:
    options = dataclasses.replace(options, batch_size=24)
    whole, parts = (first_step(dataset, options, "joint", size) for size in (None, micro_batch))
    assert all(torch.equal(gradient, parts.gradients[name]) for name, gradient in whole.gradients.items())


def test_parts_of_a_batch_keep_to_mixed_precision(dataset: CompositionDataset, options: SACOptions) -> None:
    options = dataclasses.replace(options, batch_size=24)
    whole, parts, exact = (
        first_step(dataset, options, "joint", size, precision=precision)
        for size, precision in ((None, "bf16-mixed"), (7, "bf16-mixed"), (7, "32-true"))
    )
    for name, gradient in whole.gradients.items():
        assert parts.gradients[name].dtype == gradient.dtype
        rounding = (gradient - exact.gradients[name]).norm()
        assert rounding > 0
        assert (parts.gradients[name] - gradient).norm() <= rounding


def test_texts_are_encoded_once_a_step(
    dataset: CompositionDataset, options: SACOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = SAC.texts, []
    monkeypatch.setattr(SAC, "texts", lambda self, space: (calls.append(1), encode(self, space))[1])
    first_step(dataset, dataclasses.replace(options, batch_size=24), "align", 5)
    assert len(calls) == 1


def test_checkpoints_reach_the_model(dataset: CompositionDataset, options: SACOptions) -> None:
    for checkpoint in (False, True):
        sac = build_sac("tiny", dataset.space, dataclasses.replace(options, checkpoint=checkpoint))
        assert sac.checkpoint == sac.prompts.checkpoint == checkpoint
