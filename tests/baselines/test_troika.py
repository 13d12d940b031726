"""Troika's own options: traction in chunks, quirks of the released code one by one, and Sparse Alignment's choices."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from baselines.troika import BRANCHES, OFFICIAL, CrossAttention, Disentangler, Quirks, Traction, TractionLayer, Troika
from czsl_heads import CompositionSpace, SparseAlignHead, wrap
from czsl_heads.functional import maxsim

SPACE = CompositionSpace(["red", "striped", "blue"], ["circle", "star"], seen=[(0, 0), (1, 1), (2, 0)]).open_world()
PAIRS, TARGETS = SPACE.pairs[:5], torch.tensor([4, 0, 2, 1, 1, 3, 0])


@pytest.fixture(scope="module")
def images():
    return torch.randn(7, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def build(**options):
    """Disturbed, so that traction, adapters and norms all have an effect."""
    torch.manual_seed(0)
    small = {"layers": 2, "adapter_dim": 4, "adapter_dropout": 0.0}
    troika = Troika(wrap("tiny"), SPACE, **{**small, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    named = sorted(troika.named_parameters(), key=lambda each: each[0].startswith("encoder."))  # whose draws come last
    with torch.no_grad():
        for _, parameter in named:
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return troika


def loss_and_gradients(troika, images, seed=0):
    torch.manual_seed(seed)
    loss = troika.loss(images, PAIRS, TARGETS)
    loss.backward()
    return loss, {name: p.grad for name, p in troika.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("align", ["cls", SparseAlignHead("topk", k=3)], ids=["cls", "topk"])
def test_traction_in_chunks_is_traction(images, chunk, align):
    whole, parts = build(align=align), build(align=align, traction_chunk=chunk)
    for one, other in zip(whole(images, PAIRS), parts(images, PAIRS)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    (loss, gradients), (same, others) = (loss_and_gradients(model, images) for model in (whole, parts))
    torch.testing.assert_close(loss, same)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-5 * gradient.abs().max().item() + 1e-9, rtol=1e-4)


def test_chunks_draw_their_dropout_once(images):
    """The second run, in the backward pass, must see the masks of the first: the gradient is that of the loss."""
    troika = build(traction_chunk=2, traction_dropout=0.3).train().double()
    for view in (troika.attribute_disentangler, troika.object_disentangler):
        view.eval()
    loss, gradients = loss_and_gradients(troika, images.double())
    weight, step = troika.traction.weight, 1e-6
    with torch.no_grad():
        weight[3] += step
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moved = troika.loss(images.double(), PAIRS, TARGETS)
    assert ((moved - loss) / step).item() == pytest.approx(gradients["traction.weight"][3].item(), rel=1e-3)


def test_what_training_keeps_is_bounded_by_the_chunk(images):
    def kept(chunk):
        sizes = []
        troika = build(traction_chunk=chunk)
        texts = troika.texts(SPACE.pairs)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            tokens = troika.encoder.encode_tokens(images)
            normed = troika._normed(tokens)[0]
            sizes.clear()
            troika._branch([tokens[:, :1]], normed, texts.pairs)
        return sum(sizes)

    assert kept(1) < kept(6) / 4


def test_traction_is_of_each_image_and_of_each_text():
    torch.manual_seed(0)
    traction = Traction(64, 2, init=0.1, dropout=0.0).double()
    tokens, texts = torch.randn(3, 5, 64).double(), F.normalize(torch.randn(4, 64).double(), dim=1)
    drawn = traction(texts, traction.read(tokens), 3)
    assert drawn.shape == (3, 4, 64)
    torch.testing.assert_close(drawn.norm(dim=2), torch.ones(3, 4).double())
    alone = traction(texts[2:3], traction.read(tokens[1:2]), 1)
    torch.testing.assert_close(drawn[1:2, 2:3], alone)
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(traction(texts, traction.read(tokens[:, order]), 3), drawn)


def test_without_weight_the_texts_stay():
    traction = Traction(64, 1, init=0.0, dropout=0.0)
    texts = F.normalize(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    drawn = traction(texts, traction.read(torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))), 3)
    torch.testing.assert_close(drawn, texts.expand(3, -1, -1))


def test_at_first_the_published_features_are_those_of_clip(images):
    encoder = wrap("tiny")
    with torch.no_grad():
        before = encoder.encode_tokens(images)
        Troika(encoder, SPACE)
        assert torch.equal(encoder.encode_tokens(images), before)


def test_official_turns_on_every_quirk_and_any_can_be_taken_back():
    assert build().quirks == Quirks("fresh", "probs", 0, False, False)
    assert build(official=True).quirks == OFFICIAL == Quirks("cumulative", "logits", 1024, True, True)
    mixed = build(official=True, fusion="probs", text_chunk=0, stays_in_eval=False).quirks
    assert mixed == Quirks("cumulative", "probs", 0, True, False)
    assert build(fusion="logits").quirks == Quirks(fusion="logits")


def test_the_cumulative_norm_changes_the_primitives_only(images):
    fresh, cumulative = (build(patch_norm=name)(images, PAIRS) for name in ("fresh", "cumulative"))
    assert torch.equal(fresh.pairs, cumulative.pairs)
    assert not torch.allclose(fresh.attributes, cumulative.attributes)
    assert not torch.allclose(fresh.objects, cumulative.objects)


def test_an_untrained_norm_may_be_repeated(images):
    models = [Troika(wrap("tiny"), SPACE, layers=1, patch_norm=name).eval() for name in ("fresh", "cumulative")]
    models[1].load_state_dict(models[0].state_dict())
    for one, other in zip(*(model(images, PAIRS) for model in models)):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


@pytest.mark.parametrize("fusion", ["probs", "logits"])
def test_scores_add_the_product_of_primitives(images, fusion):
    troika = build(fusion=fusion, inference_weights=(2.0, 0.5, 3.0))
    logits = troika(images, PAIRS)
    pairs = logits.pairs.softmax(1) if fusion == "probs" else logits.pairs
    attributes, objects = (0.5 * logits.attributes.softmax(1), 3.0 * logits.objects.softmax(1))
    expected = 2.0 * pairs + attributes[:, PAIRS[:, 0]] * objects[:, PAIRS[:, 1]]
    torch.testing.assert_close(troika.scores(images, PAIRS), expected)


def test_a_primitive_of_no_weight_is_a_factor_of_one(images):
    troika = build(inference_weights=(1.0, 0.0, 0.5))
    logits = troika(images, PAIRS)
    expected = logits.pairs.softmax(1) + 0.5 * logits.objects.softmax(1)[:, PAIRS[:, 1]]
    torch.testing.assert_close(troika.scores(images, PAIRS), expected)


@pytest.mark.parametrize(("chunk", "copies"), [(5, 1), (4, 2), (2, 3), (1, 5)])
def test_chunks_of_the_released_evaluation_divide_the_primitives_twice(images, chunk, copies):
    clean, chunked = build(fusion="logits"), build(fusion="logits", text_chunk=chunk)
    logits = clean(images, PAIRS)
    repeated = [rows.repeat(1, copies).softmax(1) for rows in logits[1:]]  # what that code computes
    expected = logits.pairs + repeated[0][:, PAIRS[:, 0]] * repeated[1][:, PAIRS[:, 1]]
    torch.testing.assert_close(chunked.scores(images, PAIRS), expected)
    product = clean.scores(images, PAIRS) - logits.pairs
    torch.testing.assert_close(chunked.scores(images, PAIRS) - logits.pairs, product / copies**2, atol=1e-5, rtol=0)
    difference = chunked.validation_loss(images, PAIRS, TARGETS) - clean.validation_loss(images, PAIRS, TARGETS)
    torch.testing.assert_close(difference, torch.tensor(0.2 * math.log(copies)), atol=1e-5, rtol=0)
    torch.testing.assert_close(chunked.loss(images, PAIRS, TARGETS), clean.loss(images, PAIRS, TARGETS))


def test_the_released_validation_loss_takes_scores_for_logits(images):
    clean, fused = build(fusion="logits"), build(fusion="logits", fused_validation_loss=True)
    assert torch.equal(clean.validation_loss(images, PAIRS, TARGETS), clean.loss(images, PAIRS, TARGETS))
    logits = clean(images, PAIRS)
    change = F.cross_entropy(clean.scores(images, PAIRS), TARGETS) - F.cross_entropy(logits.pairs, TARGETS)
    actual = fused.validation_loss(images, PAIRS, TARGETS) - fused.loss(images, PAIRS, TARGETS)
    torch.testing.assert_close(actual, change, atol=1e-5, rtol=0)
    assert change.abs() > 1e-3


def test_the_loss_weighs_the_branches(images):
    logits = build()(images, PAIRS)
    targets = (TARGETS, PAIRS[TARGETS, 0], PAIRS[TARGETS, 1])
    terms = [F.cross_entropy(rows, target) for rows, target in zip(logits, targets)]
    for weights in ((1.0, 0.0, 0.0), (0.0, 2.0, 0.0), (1.0, 0.1, 0.3)):
        expected = sum(weight * term for weight, term in zip(weights, terms))
        torch.testing.assert_close(build(loss_weights=weights).loss(images, PAIRS, TARGETS), expected)


def test_the_released_loop_trains_in_eval_mode_after_its_first_validation():
    modes = []
    for troika in (build(), build(stays_in_eval=True)):
        for _ in range(2):  # an evaluation before the training changes nothing
            troika.eval()
        for _ in range(3):
            modes.append(troika.train().training)
            assert troika.prompts.training == troika.training
            troika.eval()
    assert modes == [True, True, True, True, False, False]
    assert not troika.training


@pytest.mark.parametrize("include_cls", [True, False])
def test_sparse_alignment_takes_the_best_token_of_each_branch(images, include_cls):
    options = {"disentangle": "each", "patch_norm": "cumulative"}
    troika = build(align=SparseAlignHead(include_cls=include_cls), **options)
    texts, tokens = troika.texts(PAIRS), troika.encoder.encode_tokens(images)
    scale, first = troika.encoder.logit_scale, 0 if include_cls else 1
    views = (lambda rows: rows, troika.attribute_disentangler, troika.object_disentangler)
    for branch, (view, rows, normed) in enumerate(zip(views, texts, troika._normed(tokens))):
        drawn = troika.traction(rows, troika.traction.read(normed), len(images))
        cosines = F.normalize(view(tokens)[:, first:], dim=-1) @ drawn.mT
        torch.testing.assert_close(troika(images, PAIRS)[branch], scale * cosines.amax(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("branches", [("pairs",), ("attributes", "objects"), ()])
def test_branches_without_sparse_alignment_are_as_published(images, branches):
    published = build()
    sparse, mixed = (
        build(align=SparseAlignHead(), disentangle="each", align_branches=which) for which in (BRANCHES, branches)
    )
    mixed = mixed(images, PAIRS)
    for name, rows in mixed._asdict().items():
        expected = getattr((sparse if name in branches else published)(images, PAIRS), name)
        assert torch.equal(rows, expected)


def test_the_winner_of_the_best_pair_is_disentangled_alone(images):
    troika = build(align=SparseAlignHead(include_cls=False))
    each = build(align=SparseAlignHead(include_cls=False), disentangle="each")
    logits, texts = troika(images, PAIRS), troika.texts(PAIRS)
    assert torch.equal(logits.pairs, each(images, PAIRS).pairs)
    tokens = troika.encoder.encode_tokens(images)
    normed = troika._normed(tokens)[0]
    drawn = troika.traction(texts.pairs, troika.traction.read(normed), len(images))
    _, index = maxsim(F.normalize(tokens[:, 1:], dim=-1), drawn, return_index=True)
    rows = torch.arange(len(images))
    winner = tokens[:, 1:][rows, index[rows, logits.pairs.argmax(1)]]
    view = F.normalize(troika.attribute_disentangler(winner[:, None]), dim=-1)
    attributes = troika.traction(texts.attributes, troika.traction.read(normed), len(images))
    expected = troika.encoder.logit_scale * (view * attributes).sum(-1)
    torch.testing.assert_close(logits.attributes, expected, atol=1e-4, rtol=0)


def test_with_the_class_token_alone_the_choice_for_tokens_says_nothing(images):
    published = build()(images, PAIRS)
    for one, other in zip(published, build(disentangle="each")(images, PAIRS)):
        assert torch.equal(one, other)


def test_the_disentangler_normalises_over_all_tokens():
    tokens = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)).double()
    view = Disentangler(8, dtype=torch.float64)
    view.norm.momentum = 1.0  # the running statistics are those of the last batch
    rows = view.proj(tokens).flatten(0, 1)
    normed = (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt()
    expected = normed.relu().unflatten(0, (5, 3))
    torch.manual_seed(0)
    actual = view.train()(tokens)
    kept = actual != 0
    torch.testing.assert_close(actual[kept], 2 * expected[kept])
    assert 0.2 < kept[expected > 0].double().mean() < 0.8
    torch.testing.assert_close(view.norm.running_mean, rows.mean(0))

    lasting = (view.norm.running_var + 1e-5).sqrt()
    expected = ((rows - rows.mean(0)) / lasting).relu().unflatten(0, (5, 3))
    torch.testing.assert_close(view.eval()(tokens), expected)


def test_each_token_has_a_dropout_mask_of_its_own():
    tokens = torch.randn(5, 1, 8, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1)
    torch.manual_seed(0)
    viewed = Disentangler(8).train()(tokens)
    assert not torch.equal(viewed[:, 0], viewed[:, 1])


@pytest.mark.parametrize(
    "make",
    [
        lambda **kind: Disentangler(64, **kind),
        lambda **kind: CrossAttention(64, 0.0, **kind),
        lambda **kind: TractionLayer(64, 0.0, **kind),
        lambda **kind: Traction(64, 2, init=0.1, dropout=0.0, **kind),
    ],
    ids=["Disentangler", "CrossAttention", "TractionLayer", "Traction"],
)
def test_parts_are_made_where_and_as_they_are_wanted(make):
    parameters = [*make(device="meta", dtype=torch.float64).parameters()]
    assert {(p.device.type, p.dtype) for p in parameters} == {("meta", torch.float64)}
    assert [p.shape for p in parameters] == [p.shape for p in make().parameters()]


def test_checkpointing_both_towers_changes_no_gradient(images):
    plain, saving = build(), build(checkpoint=True)
    (loss, gradients), (same, others) = (loss_and_gradients(model, images) for model in (plain, saving))
    torch.testing.assert_close(loss, same)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-5 * gradient.abs().max().item() + 1e-9, rtol=1e-4)


def test_a_copy_is_independent(images):
    troika = build()
    before = troika.scores(images, PAIRS)
    twin = copy.deepcopy(troika)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert torch.equal(troika.scores(images, PAIRS), before)
    assert not torch.equal(twin.scores(images, PAIRS), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_norm": "twice"}, "`patch_norm` to be one of fresh, cumulative"),
        ({"fusion": "sum"}, "`fusion` to be one of probs, logits"),
        ({"text_chunk": -1}, "`text_chunk` to be at least 0"),
        ({"align_branches": ("pair",)}, "`align_branches` to be one of pairs, attributes, objects"),
        ({"disentangle": "all"}, "`disentangle` to be one of winner, each"),
        ({"traction_chunk": 0}, "`traction_chunk` to be at least 1"),
        ({"layers": -1}, "`layers` to be at least 0"),
        ({"loss_weights": (1.0, 1.0)}, "`loss_weights` of pairs, attributes and objects"),
        ({"inference_weights": (1.0, -1.0, 1.0)}, "`inference_weights` to be at least 0"),
        ({"traction_dropout": 1.5}, r"`traction_dropout` to be in \[0, 1\]"),
        ({"adapter_dim": 0}, "`adapter_dim` to be at least 1"),
        ({"adapter_dropout": 2}, r"`adapter_dropout` to be in \[0, 1\]"),
        ({"init_weight": math.nan}, "`init_weight` to be"),
        ({"primitives": torch.zeros(4, 96)}, r"`primitives` of shape \(5, 96\)"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    encoder = wrap("tiny")
    before = list(encoder.state_dict())
    with pytest.raises(ValueError, match=message):
        Troika(encoder, SPACE, **options)
    assert list(encoder.state_dict()) == before


def test_an_encoder_serves_one_troika():
    encoder = wrap("tiny")
    Troika(encoder, SPACE)
    with pytest.raises(ValueError, match="got one that has them already"):
        Troika(encoder, SPACE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"official": "no"}, "`official` to be a bool, got str"),
        ({"checkpoint": 1}, "`checkpoint` to be a bool"),
        ({"stays_in_eval": "yes"}, "`stays_in_eval` to be a bool"),
        ({"fused_validation_loss": 3}, "`fused_validation_loss` to be a bool"),
        ({"align_branches": None}, "`align_branches` to be a list of names, got None"),
        ({"align_branches": "pairs"}, "`align_branches` to be a list of names, got 'pairs'"),
        ({"loss_weights": 1}, "`loss_weights` to be a Sequence, got int"),
        ({"init_weight": "much"}, "`init_weight` to be a number"),
    ],
)
def test_options_of_another_kind_are_named(options, message):
    with pytest.raises(TypeError, match=message):
        build(**options)


def test_one_image_is_no_batch_to_train_on(images):
    with pytest.raises(ValueError, match="`images` to be at least two in training"):
        build().train().loss(images[:1], PAIRS, torch.tensor([0]))


def test_the_winner_and_so_the_primitives_depend_on_the_pairs_asked_for(images):
    winner, each = (build(align=SparseAlignHead(include_cls=False), disentangle=name) for name in ("winner", "each"))
    for troika, same in ((winner, False), (each, True)):
        few, all_pairs = troika(images, PAIRS[:1]), troika(images, PAIRS)
        assert torch.allclose(few.attributes, all_pairs.attributes, atol=1e-4) == same
        torch.testing.assert_close(few.pairs, all_pairs.pairs[:, :1], atol=1e-4, rtol=0)
