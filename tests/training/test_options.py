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
    ],
)
def test_wrong_options_raise(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
