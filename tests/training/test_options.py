"""Presets and what may be changed in them."""

import pytest

from czsl_heads.training.options import SACOptions, load_options, preset_names


def test_every_preset_loads() -> None:
    assert preset_names() == ["cgqa", "mit-states", "shapes", "ut-zappos"]
    for name in preset_names():
        assert isinstance(load_options(name), SACOptions)


@pytest.mark.parametrize(
    ("preset", "epochs", "batch_size", "learning_rate"),
    [("ut-zappos", 15, 64, 2e-4), ("mit-states", 10, 64, 5e-5), ("cgqa", 15, 16, 5e-4)],
)
def test_presets_hold_the_published_figures(preset: str, epochs: int, batch_size: int, learning_rate: float) -> None:
    options = load_options(preset)
    assert (options.epochs, options.batch_size, options.learning_rate) == (epochs, batch_size, learning_rate)


def test_an_override_replaces_one_option() -> None:
    options = load_options("cgqa", {"epochs": 2, "lora_matrices": ["fc"]})
    assert (options.epochs, options.lora_matrices, options.batch_size) == (2, ("fc",), 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_options("imagenet"), "expected `preset` to be one of cgqa, .*got 'imagenet'"),
        (lambda: load_options("shapes", {"epoch": 2}), "expected `options` to be one of epochs, .*got 'epoch'"),
        (lambda: SACOptions(epochs=0), "expected `epochs` to be at least 1, got 0"),
        (lambda: SACOptions(learning_rate=0), "expected `learning_rate` to be positive and finite, got 0"),
        (lambda: SACOptions(condense_epochs=0), "expected `condense_epochs` to be at least 1, got 0"),
        (lambda: SACOptions(micro_batch=0), "expected `micro_batch` to be at least 1, got 0"),
        (lambda: SACOptions(condense_learning_rate=-1), "expected `condense_learning_rate` to be positive"),
        (lambda: SACOptions(patch_drop=1), r"expected `patch_drop` to be in \[0, 0.99\], got 1"),
        (lambda: SACOptions(alpha=2), r"expected `alpha` to be in \[0, 1\], got 2"),
        (lambda: SACOptions(slots=0), "expected `slots` to be at least 1, got 0"),
        (lambda: SACOptions(direction="up"), "expected `direction` to be one of reverse, forward, got 'up'"),
        (lambda: SACOptions(bank_empty="full"), "expected `bank_empty` to be one of mask, zero, got 'full'"),
        (lambda: SACOptions(fusion="logits"), 'expected `bank_empty` to be zero where fusion="logits"'),
    ],
)
def test_wrong_options_raise(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["joint", "cache", "condense_augment", "bank_labels", "include_cls", "checkpoint"])
def test_switches_are_true_or_false(name: str) -> None:
    with pytest.raises(TypeError, match=f"expected `{name}` to be a bool, got str"):
        SACOptions(**{name: "yes"})


@pytest.mark.parametrize(
    ("preset", "depth", "alpha", "beta", "gamma", "slots"),
    [("ut-zappos", 3, 0.5, 0.3, 0.5, 16), ("mit-states", 3, 0.9, 0.7, 0.4, 24), ("cgqa", 1, 0.5, 0.7, 0.1, 16)],
)
def test_presets_hold_the_published_weights(
    preset: str, depth: int, alpha: float, beta: float, gamma: float, slots: int
) -> None:
    options = load_options(preset)
    found = (options.depth, options.alpha, options.beta, options.gamma, options.slots)
    assert found == (depth, alpha, beta, gamma, slots)
