"""EVA's losses and scores against its formulas written out, and what its options switch on."""

import pytest
import torch
import torch.nn.functional as F

from baselines.eva import EVA, Encoded, EVALogits
from czsl_heads import SparseAlignHead, wrap
from czsl_heads.adapters.experts import mixtures_of
from czsl_heads.data import read_dataset
from czsl_heads.models.recipe import build as build_recipe
from czsl_heads.training.options import load_options
from czsl_heads.training.own_table import has_own_table, own_table
from tests.models.shared import PAIRS, SEEN, TARGETS, disturb, learned, make_images, make_space

COUNTS = (3, 2)  # attributes and objects


@pytest.fixture(scope="module")
def images():
    return make_images()


def make(**options):
    torch.manual_seed(0)
    return disturb(EVA(wrap("tiny"), make_space(), **{"rank": 2, "experts": 3, **options}))


def by_hand(model, images, pairs):
    """Probabilities of pairs, and of the words of each, by loops."""
    texts = model.texts(pairs)
    image = F.normalize(model.encoder.encode_images(images), dim=1)
    of_pairs = (model.encoder.logit_scale * image @ texts.pairs.T).softmax(dim=1)
    scales = model.words.log_scale_attributes.exp(), model.words.log_scale_objects.exp()
    of_words = []
    for kind, (count, scale) in enumerate(zip(COUNTS, scales)):
        columns = []
        for word in range(count):
            has = pairs[:, kind] == word
            best = of_pairs[:, has].amax(dim=1) if has.any() else torch.full((len(images),), -torch.inf)
            columns.append(scale * best)
        of_words.append(torch.stack(columns, dim=1))
    return of_pairs, of_words


@torch.no_grad()
def test_scores_are_pairs_and_the_best_pairs_of_their_words(images):
    model = make().eval()
    of_pairs, (attributes, objects) = by_hand(model, images, PAIRS)
    words = attributes.softmax(dim=1)[:, PAIRS[:, 0]] + objects.softmax(dim=1)[:, PAIRS[:, 1]]
    torch.testing.assert_close(model.scores(images, PAIRS), of_pairs + 0.5 * words, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("variants", "alpha"), [("cross", 0.0), ("both", 0.7)])
def test_losses_are_the_formula(images, variants, alpha):
    model = make(variants=variants, alpha=0.7, primitive_weight=0.3, variant_weight=0.2).train()
    encoded, texts = model.encode(images), model.texts(SEEN)
    (logits,) = model.compare(encoded, texts)
    found = model.losses(logits, SEEN, TARGETS)
    of_pairs, words = by_hand(model, images, SEEN)
    torch.testing.assert_close(found["loss_pairs"], F.nll_loss(of_pairs.log(), TARGETS), rtol=1e-3, atol=1e-4)

    image = F.normalize(encoded.tokens[:, 0], dim=1)
    variants = F.normalize(encoded.variants, dim=2)
    total = found["loss_pairs"]
    for kind, name in enumerate(("attrs", "objs")):
        word, rows = SEEN[TARGETS, kind], texts[1 + kind]
        torch.testing.assert_close(found[f"loss_{name}"], F.cross_entropy(words[kind], word), rtol=1e-4, atol=1e-5)
        terms = []
        for number in range(len(images)):
            own = variants[number]
            affinity = own @ rows[word[number]] + alpha * own @ image[number]
            chosen = own[affinity.argmax()]
            terms.append(F.cross_entropy(model.encoder.logit_scale * chosen @ rows.T, word[number]))
        torch.testing.assert_close(found[f"loss_variant_{name}"], torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)
        total = total + 0.3 * found[f"loss_{name}"] + 0.2 * found[f"loss_variant_{name}"]
    torch.testing.assert_close(found["loss"], total)


def test_variants_are_for_training_only(images):
    model = make()
    assert isinstance(model.train().encode(images), Encoded)
    assert isinstance(model.eval().encode(images), torch.Tensor)
    assert list(model.losses(model(images, SEEN), SEEN, TARGETS)) == ["loss_pairs", "loss_attrs", "loss_objs", "loss"]
    assert isinstance(make(variants="none").train().encode(images), torch.Tensor)


def test_all_that_is_learned_gets_a_gradient(images):
    model = make(isolation_weight=0.1, balance_weight=0.1).train()
    model.loss(images, SEEN, TARGETS).backward()
    towers = [mixtures_of(model.encoder, tower) for tower in ("vision", "text")]
    assert [len(mixtures) for mixtures in towers] == [4, 3]
    for parameter in learned(model):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    routers = [mixture.router.weight.grad for mixtures in towers for mixture in mixtures]
    assert all(gradient.any() for gradient in routers)


def test_the_extra_losses_are_of_variants_and_of_loads(images):
    model = make(isolation_weight=0.1, balance_weight=0.01).train()
    logits = model(images, SEEN)
    assert isinstance(logits, EVALogits)
    variants = F.normalize(model.encode(images).variants, dim=2)
    different = ~torch.eye(4, dtype=torch.bool)
    overlap = (variants @ variants.mT)[:, different].mean(dim=1)
    torch.testing.assert_close(logits.overlap, overlap, rtol=1e-4, atol=1e-5)
    assert (logits.imbalance > 0).all()
    found = model.losses(logits, SEEN, TARGETS)
    plain = make().train().losses(logits, SEEN, TARGETS)
    expected = plain["loss"] + 0.1 * overlap.mean() + 0.01 * logits.imbalance.mean()
    torch.testing.assert_close(found["loss"], expected)


@torch.no_grad()
def test_without_experts_it_is_soft_prompts(images):
    model = make(experts=0, variants="none", text_to_image=False).eval()
    assert not any("mixture" in name for name, _ in model.named_parameters())
    texts = model.texts(PAIRS)
    image = F.normalize(model.encoder.encode_images(images), dim=1)
    scale = model.encoder.logit_scale
    probabilities = [(scale * image @ rows.T).softmax(dim=1) for rows in texts]
    words = probabilities[1][:, PAIRS[:, 0]] + probabilities[2][:, PAIRS[:, 1]]
    torch.testing.assert_close(model.scores(images, PAIRS), probabilities[0] + 0.5 * words, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_words_of_no_candidate_have_no_chance(images):
    model = make().eval()
    only = PAIRS[PAIRS[:, 0] == 1]
    found = model.parts(model(images, only), only)
    torch.testing.assert_close(found["attribute"], torch.ones(len(images), len(only)))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_checkpoints_change_no_gradient(images, checkpoint):
    model = make(align=SparseAlignHead(), balance_weight=0.1, checkpoint=checkpoint).train()
    model.loss(images, SEEN, TARGETS).backward()
    other = make(align=SparseAlignHead(), balance_weight=0.1).train()
    other.loss(images, SEEN, TARGETS).backward()
    for one, two in zip(learned(model), learned(other)):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4)


def test_wrong_options_are_told():
    with pytest.raises(ValueError, match="expected `variants` to be \"none\" without experts, got 'both'"):
        make(experts=0)
    with pytest.raises(ValueError, match=r"expected `balance_weight` to be 0 without experts, got 0\.1"):
        make(experts=0, variants="none", balance_weight=0.1)
    with pytest.raises(ValueError, match="expected `beta` to be at least 0, got -1"):
        make(beta=-1)
    with pytest.raises(ValueError, match="expected `variants` to be one of none, cross, both, got 'all'"):
        make(variants="all")


def test_its_table_is_data():
    table = own_table("eva")
    assert [row.key for row in table.rows][:6] == ["base", "words", "experts", "t2i", "cross", "eva"]
    assert table.baseline == "base"
    assert has_own_table("eva")
    assert not has_own_table("csp")
    with pytest.raises(ValueError, match="expected `table` to be one of steps, alignment for csp"):
        own_table("csp")
    options = load_options("eva", "shapes")[0]
    assert options.model["beta"] == 0.5
    assert (options.model["experts"], options.model["shared"]) == (8, 1)


def test_every_model_of_its_table_can_be_built(shapes_root):
    from czsl_heads.training.options import change

    space = read_dataset(shapes_root).space
    options = load_options("eva", "shapes")[0]
    for trained in {row.model.folder: row.model for row in own_table("eva").rows}.values():
        own = change(options, trained.changes)
        model = build_recipe(own.recipe("eva", "tiny", trained.align, condenser=trained.stage == "condense"), space)
        method = getattr(model, "method", model)
        assert len(mixtures_of(method.encoder, "vision")) == (4 if method.experts else 0)
