from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from czsl_heads.models.recipe import LoRAOptions, Recipe, build
from czsl_heads.training import feature_cache
from czsl_heads.training.ablate import run_ablation
from czsl_heads.training.feature_cache import FrozenTokens, encoded, evaluation_images
from czsl_heads.training.loaders import eval_loader


def images_of(dataset, model, *, batch_size=10, precision="32-true"):
    return evaluation_images(dataset, "val", model, nullcontext, precision=precision, batch_size=batch_size, workers=0)


@pytest.fixture
def cached(dataset, tmp_path):
    return replace(dataset, cache_dir=tmp_path / "cache")


def tokens_files(cached):
    return sorted(cached.cache_dir.glob("tokens-*.npy"))


@torch.no_grad()
def test_tokens_are_those_of_a_run_without_to_the_bit(dataset, cached):
    model = build(Recipe("csp"), dataset.space)
    kept = images_of(cached, model)
    assert isinstance(kept, FrozenTokens)
    assert model.training  # as it was
    model.eval()
    both = zip(eval_loader(kept, 10), eval_loader(images_of(dataset, model), 10))
    for (tokens, columns), (images, wanted) in both:
        assert torch.equal(encoded(model, tokens), model.encode(images))
        assert torch.equal(columns, wanted)


def test_what_decides_the_tokens_names_the_file(cached):
    model = build(Recipe("csp"), cached.space)
    images_of(cached, model)
    images_of(cached, build(Recipe("clip"), cached.space))  # another method, the same CLIP
    assert len(tokens_files(cached)) == 1
    images_of(cached, model, batch_size=7)
    images_of(cached, model, precision="bf16-mixed")
    images_of(cached, build(Recipe("csp", dense="value"), cached.space))
    assert len(tokens_files(cached)) == 4
    images_of(replace(cached, upright=False), model)
    assert len(tokens_files(cached)) == 5


def test_a_clip_that_is_trained_is_not_kept(cached):
    for recipe in (Recipe("sac", lora=LoRAOptions(rank=1)), Recipe("troika")):
        assert not isinstance(images_of(cached, build(recipe, cached.space)), FrozenTokens)
    model = build(Recipe("csp"), cached.space)
    next(model.encoder.parameters()).data.add_(1)
    assert not isinstance(images_of(cached, model), FrozenTokens)


def test_what_would_take_too_much_is_not_kept(cached, monkeypatch):
    monkeypatch.setattr(feature_cache, "LIMIT", 1000)
    assert not isinstance(images_of(cached, build(Recipe("csp"), cached.space)), FrozenTokens)
    assert tokens_files(cached) == []


@pytest.mark.engine
def test_a_command_has_the_same_results_with_caches(configured, tmp_path):
    runs = {}
    for name, cache_dir in (("without", None), ("first", tmp_path / "c"), ("again", tmp_path / "c")):
        runs[name] = run_ablation(tmp_path / name, configured("csp", cache_dir=cache_dir, add=("vac",)))["rows"]
    assert runs["first"] == runs["without"]
    assert runs["again"] == runs["without"]
    kinds = [path.name.partition("-")[0] for path in (tmp_path / "c").glob("*.npy")]
    assert (kinds.count("pixels"), kinds.count("tokens")) == (3, 3)
