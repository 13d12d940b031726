"""Recipes: models from plain values, and plain values from models."""

import json
import re
from typing import get_args

import pytest
import torch

from czsl_heads import SparseAlignHead, VACondenser, wrap
from czsl_heads.adapters.lora_layers import LoRAAttention
from czsl_heads.encoders.digest import weights_digest
from czsl_heads.heads.sparse_align import POOLS, Reduce
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.recipe import (
    DECIDED,
    BankOptions,
    CondenserOptions,
    HeadOptions,
    LoRAOptions,
    Recipe,
    build,
    build_head,
    from_plain,
    method_options,
    new_bank,
)
from czsl_heads.models.registry import find_method
from tests.models.shared import METHODS, PAIRS, make_images, make_space

SMALL = {"troika": {"layers": 1, "adapter_dim": 4}}
# No option has its default, so that one that is lost cannot go unnoticed.
FULL = Recipe(
    "sac",
    align="topk",
    head=HeadOptions(topk=3, temperature=0.02, include_cls=False, cls_weight=0.3),
    lora=LoRAOptions(rank=2, alpha=3.0, dropout=0.1, matrices=("q", "o"), layers=1),
    patch_drop=0.5,
    checkpoint=True,
    model={"context": "a picture of", "dropout": 0.2, "fusion": "logits"},
    condenser=CondenserOptions(depth=2, dropout=0.1),
    bank=BankOptions(3, temperature=0.2, logit_scale=20.0, empty="zero", normalize=True, labels=True),
    alpha=0.1,
    beta=0.2,
    gamma=0.3,
    direction="forward",
    joint=True,
)


def make(name, **options):
    torch.manual_seed(0)
    return build(Recipe(name, model=SMALL.get(name, {}), **options), make_space())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("condenser", [None, CondenserOptions(depth=2)], ids=["alone", "condensed"])
def test_every_method_is_built_with_and_without_a_condenser(name, condenser):
    model = make(name, condenser=condenser).eval()
    method = model if condenser is None else model.method
    assert type(method) is find_method(name)
    assert isinstance(model, Condensed) == (condenser is not None)
    assert model.recipe.method == name
    assert model.encoder_digest == weights_digest(wrap("tiny"))
    assert model.space == make_space()
    with torch.no_grad():
        assert model.scores(make_images()[:2], PAIRS).shape == (2, 4)


@pytest.mark.parametrize("align", get_args(Reduce))
def test_every_reduction_is_built(align):
    head = make("csp", align=align).seam.head
    assert head.reduce == align
    assert float(head.logit_scale) == 1.0
    assert (next(head.parameters(), None) is not None) == (align in POOLS)
    built = build_head(Recipe("csp", align=align), 96)
    assert built == "cls" if align == "cls" else isinstance(built, SparseAlignHead)


def test_every_option_arrives():
    model = build(FULL, make_space())
    method, head = model.method, model.seam.head
    assert (head.reduce, head.k, head.include_cls, head.cls_weight) == ("topk", 3, False, 0.3)
    adapted = [module for module in model.modules() if isinstance(module, LoRAAttention)]
    assert [sorted(module.deltas) for module in adapted] == [["o", "q"]]
    assert (method.checkpoint, method.fusion, method.prompts.dropout) == (True, "logits", 0.2)
    words = wrap("tiny").embed_texts(["a picture of"])[0][0, 1:4]
    assert torch.equal(method.prompts.pair_context, words)
    assert (model.alpha, model.beta, model.gamma, model.direction, model.joint) == (0.1, 0.2, 0.3, "forward", True)
    assert build(Recipe("sac", condenser=CondenserOptions(depth=2)), make_space()).condenser.depth == 2
    bank = new_bank(make_space(), model.encoder, FULL.bank)
    assert (bank.num_pairs, bank.slots, bank.temperature, bank.logit_scale) == (4, 3, 0.2, 20.0)
    assert (bank.empty, bank.normalize) == ("zero", True)


def test_dropped_patches_are_those_of_training():
    model, images = make("csp", align="max", patch_drop=0.5), make_images()
    assert model.train().encode(images).shape == (6, 19, 96)  # [CLS] and a half of 36 patches
    assert model.eval().encode(images).shape == (6, 37, 96)


def test_a_bank_has_the_scale_of_the_encoder_unless_it_is_told_one():
    encoder, space = wrap("tiny"), make_space()
    assert new_bank(space, encoder, BankOptions()).logit_scale == pytest.approx(float(encoder.logit_scale))
    assert new_bank(space, encoder, BankOptions(), 5).slots == 5
    assert int(new_bank(space.open_world(), encoder, BankOptions()).counts.sum()) == 0


@pytest.mark.parametrize("recipe", [FULL, Recipe("clip"), Recipe("troika", model={"loss_weights": [1.0, 0.5, 0.5]})])
def test_plain_values_give_the_recipe_again(recipe):
    plain = recipe.as_dict()
    assert from_plain(Recipe, plain, "recipe") == recipe
    assert from_plain(Recipe, json.loads(json.dumps(plain)), "recipe") == recipe


def test_values_that_are_not_named_are_defaults():
    recipe = from_plain(Recipe, {"method": "csp", "bank": {"slots": 2}, "lora": {"rank": 1}}, "recipe")
    assert recipe == Recipe("csp", bank=BankOptions(slots=2), lora=LoRAOptions(rank=1))
    assert recipe.condenser is None
    ready = CondenserOptions(depth=3)
    assert from_plain(Recipe, {"method": "csp", "condenser": ready}, "recipe").condenser is ready


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"colour": 1},
            "expected `recipe` to be one of method, encoder, align, head, .*, joint, dense, image_size, got 'colour'",
        ),
        ({"head": {"k": 1}}, "expected `recipe.head` to be one of topk, temperature, .*, got 'k'"),
        ({"lora": {"ranks": 1}}, "expected `recipe.lora` to be one of rank, alpha, .*, got 'ranks'"),
        ({"condenser": {"width": 1}}, "expected `recipe.condenser` to be one of depth, dropout, got 'width'"),
        ({"bank": {"size": 1}}, "expected `recipe.bank` to be one of slots, temperature, .*, got 'size'"),
        ({"align": "most"}, "expected `align` to be one of max, topk, .*, got 'most'"),
        ({"bank": {"empty": "hole"}}, "expected `bank.empty` to be one of mask, zero, got 'hole'"),
    ],
)
def test_unknown_names_are_told_with_the_choices(values, message):
    with pytest.raises(ValueError, match=message):
        from_plain(Recipe, {"method": "csp", **values}, "recipe")


def test_what_should_be_a_mapping_is_told():
    with pytest.raises(TypeError, match=r"expected `recipe\.bank` to hold slots, temperature, .*, got 16"):
        from_plain(Recipe, {"method": "csp", "bank": 16}, "recipe")
    with pytest.raises(TypeError, match=r"expected `recipe` to hold method, encoder, .*, got \['csp'\]"):
        from_plain(Recipe, ["csp"], "recipe")


@pytest.mark.parametrize(
    ("kind", "values", "name"),
    [
        (HeadOptions, {"topk": 0}, "head.topk"),
        (HeadOptions, {"temperature": 0.0}, "head.temperature"),
        (HeadOptions, {"cls_weight": 1.1}, "head.cls_weight"),
        (LoRAOptions, {"rank": -1}, "lora.rank"),
        (LoRAOptions, {"dropout": 2.0}, "lora.dropout"),
        (CondenserOptions, {"depth": 0}, "condenser.depth"),
        (CondenserOptions, {"dropout": -0.1}, "condenser.dropout"),
        (BankOptions, {"slots": 0}, "bank.slots"),
        (BankOptions, {"temperature": -1.0}, "bank.temperature"),
        (BankOptions, {"logit_scale": 0.0}, "bank.logit_scale"),
    ],
)
def test_options_out_of_range_are_named(kind, values, name):
    with pytest.raises(ValueError, match=re.escape(f"expected `{name}` to be")):
        kind(**values)


@pytest.mark.parametrize(
    ("kind", "values", "name"),
    [
        (HeadOptions, {"include_cls": 1}, "head.include_cls"),
        (LoRAOptions, {"matrices": "qkv"}, "lora.matrices"),
        (BankOptions, {"normalize": "no"}, "bank.normalize"),
        (BankOptions, {"labels": 0}, "bank.labels"),
        (CondenserOptions, {"depth": 1.5}, "condenser.depth"),
    ],
)
def test_options_of_another_kind_are_named(kind, values, name):
    with pytest.raises(TypeError, match=re.escape(f"expected `{name}` to be")):
        kind(**values)


def test_what_a_method_does_not_know_is_told_before_it_is_built():
    with pytest.raises(ValueError, match=r"expected `method` to be one of .*clip, coop, csp, .*, got 'duplex'"):
        make("duplex")
    with pytest.raises(ValueError, match=r"expected `model` to be one of context, dropout, .*, got 'layers'"):
        build(Recipe("csp", model={"layers": 1}), make_space())
    for name in DECIDED:
        with pytest.raises(ValueError, match=f"expected `model` to be one of context, .*, got '{name}'"):
            build(Recipe("csp", model={name: True}), make_space())
        assert name not in method_options("csp")
    assert method_options("sac") == ["context", "dropout", "fusion"]
    with pytest.raises(ValueError, match="expected `checkpoint` to be false for clip, which has none, got true"):
        make("clip", checkpoint=True)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_bits(name):
    options = {"condenser": CondenserOptions(), "align": "linear", "lora": LoRAOptions(rank=1)}
    first, second = make(name, **options), make(name, **options)
    torch.manual_seed(1)
    other = build(first.recipe, make_space()).state_dict()
    state = second.state_dict()
    assert first.state_dict().keys() == state.keys() == other.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in first.state_dict().items())
    assert not all(torch.equal(tensor, other[key]) for key, tensor in state.items())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_kept_is_what_is_trained_and_all_that_is_the_methods_own(name, rank):
    model = make(name, lora=LoRAOptions(rank=rank))
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    own = {key for key in model.state_dict() if not key.startswith("encoder.")}  # statistics of norms, too
    assert set(model.learned) == trained | own
    assert sum("running" in key or "num_batches" in key for key in own) == (6 if name == "troika" else 0)
    assert any("deltas" in key for key in trained) == bool(rank)
    assert model.learned == [key for key in model.state_dict() if key in set(model.learned)]  # in their order


@pytest.mark.parametrize("joint", [False, True])
def test_behind_a_condenser_both_are_learned_or_were(joint):
    model = make("csp", condenser=CondenserOptions(), joint=joint)
    alone = make("csp")
    condenser = [f"condenser.{name}" for name in VACondenser(96).state_dict()]
    assert model.learned == [*(f"method.{name}" for name in alone.learned), *condenser]
    assert any(parameter.requires_grad for parameter in model.method.parameters()) == joint


def test_the_digest_is_of_the_clip_before_adapters_came():
    plain, adapted = make("csp"), make("csp", lora=LoRAOptions(rank=2))
    assert plain.encoder_digest == adapted.encoder_digest
    assert weights_digest(adapted.encoder) != adapted.encoder_digest
