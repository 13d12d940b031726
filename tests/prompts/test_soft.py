import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads import CompositionSpace, SoftPrompts, wrap
from czsl_heads.prompts import soft

ATTRIBUTES, OBJECTS = ["old", "Wet", "red"], ["dog", "circle"]


@pytest.fixture
def space():
    return CompositionSpace(ATTRIBUTES, OBJECTS, seen=[("old", "dog"), ("Wet", "circle")], unseen=[("red", "dog")])


def reference_soft_prompts(encoder, prompts, pairs):
    """Every prompt by itself on the whole context: [SOS] context words [EOS] and the padding behind it."""
    table = encoder.model.token_embedding.weight
    start, end, padding = table[encoder.tokenizer([""])[0, :3]]

    def encode(context, words):
        rows = [start, *context, *words, end]
        rows += [padding] * (encoder.context_length - len(rows))
        eos = torch.tensor([1 + len(context) + len(words)])
        return F.normalize(encoder.encode_embeddings(torch.stack(rows)[None], eos)[0], dim=-1)

    attributes = prompts.primitives[: len(prompts.attributes)]
    objects = prompts.primitives[len(prompts.attributes) :]
    return (
        torch.stack([encode(prompts.pair_context, [attributes[a], objects[o]]) for a, o in pairs]),
        torch.stack([encode(prompts.attribute_context, [row]) for row in attributes]),
        torch.stack([encode(prompts.object_context, [row]) for row in objects]),
    )


def weighted_sum(features):
    """A scalar that every feature takes part in, each with a weight of its own."""
    generator = torch.Generator().manual_seed(0)
    return sum((part * torch.randn(part.shape, generator=generator)).sum() for part in features)


def test_untrained_prompts_are_the_written_out_texts(small_encoder, space):
    features = SoftPrompts(small_encoder, space)(space)
    pairs = ["a photo of old dog", "a photo of wet circle", "a photo of red dog"]
    attributes = ["a photo of old", "a photo of wet", "a photo of red"]
    objects = ["a photo of dog", "a photo of circle"]
    for part, texts in zip(features, (pairs, attributes, objects)):
        expected = F.normalize(small_encoder.encode_texts(texts), dim=-1)
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)


def test_untrained_prompts_of_the_tiny_clip_are_the_written_out_texts():
    encoder = wrap("tiny")
    space = CompositionSpace(["red", "striped"], ["circle", "moon"], seen=[("red", "circle"), ("striped", "moon")])
    features = SoftPrompts(encoder, space)(space)
    expected = F.normalize(encoder.encode_texts(["a photo of red circle", "a photo of striped moon"]), dim=-1)
    torch.testing.assert_close(features.pairs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("context", ["a photo of", "", "an old picture that somebody once took of"])
def test_the_context_may_be_of_any_length_and_empty(small_encoder, space, context):
    prompts = SoftPrompts(small_encoder, space, context=context)
    assert prompts.pair_context.shape == (len(context.split()), 56)
    expected = F.normalize(small_encoder.encode_texts([f"{context} red dog".strip()]), dim=-1)
    torch.testing.assert_close(prompts(space).pairs[2:], expected, rtol=0, atol=1e-5)


def test_prompts_without_context_train(small_encoder, space):
    prompts = SoftPrompts(small_encoder, space, context="")
    before = prompts(space).pairs.detach()
    weighted_sum(prompts(space)).backward()
    torch.optim.AdamW(prompts.parameters(), lr=0.1).step()
    assert not torch.allclose(prompts(space).pairs, before, atol=1e-3)


def test_names_are_cleaned_before_they_are_embedded(small_encoder):
    space = CompositionSpace(["Faux.Leather", "RED"], ["Dog"], seen=[("RED", "Dog")])
    clean = CompositionSpace(["faux leather", "red"], ["dog"], seen=[("red", "dog")])
    written, meant = SoftPrompts(small_encoder, space), SoftPrompts(small_encoder, clean)
    assert torch.equal(written.primitives, meant.primitives)


def test_a_name_of_several_tokens_is_their_mean(small_encoder):
    space = CompositionSpace(["red"], ["traffic light", "dog"], seen=[("red", "dog")])
    table = small_encoder.model.token_embedding.weight
    tokens = small_encoder.tokenizer(["traffic light"])[0, 1:3]
    primitives = SoftPrompts(small_encoder, space).primitives
    torch.testing.assert_close(primitives[1], (table[tokens[0]] + table[tokens[1]]) / 2, rtol=0, atol=1e-7)
    dog = table[small_encoder.tokenizer(["dog"])[0, 1]]
    torch.testing.assert_close(primitives[2], dog, rtol=0, atol=0)


def test_a_name_without_any_token_raises(small_encoder):
    space = CompositionSpace(["red"], ["dog", "..."], seen=[("red", "dog")])
    with pytest.raises(ValueError, match=r"`space` with names of at least one token, got none in '   '"):
        SoftPrompts(small_encoder, space)


@pytest.mark.parametrize("text", [{}, {"no_causal_mask": True}, {"pool_type": "eos", "eos_id": 49407}])
def test_running_the_needed_positions_equals_running_all_77(small_clip_factory, space, text):
    encoder = wrap(small_clip_factory(text=text))
    prompts = SoftPrompts(encoder, space)
    features = prompts(space)
    gradients = torch.autograd.grad(weighted_sum(features), list(prompts.parameters()))
    expected = reference_soft_prompts(encoder, prompts, space.pairs.tolist())
    expected_gradients = torch.autograd.grad(weighted_sum(expected), list(prompts.parameters()))
    for part, reference in zip(features, expected):
        torch.testing.assert_close(part, reference, rtol=0, atol=1e-5)
    for gradient, reference in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


def test_a_real_size_tower_runs_fewer_positions_alike(real_size_clip, space):
    encoder = wrap(real_size_clip, frozen=False)
    prompts = SoftPrompts(encoder, space)
    with torch.no_grad():
        pairs, attributes, objects = reference_soft_prompts(encoder, prompts, space.pairs[:1].tolist())
        features = prompts(space)
    torch.testing.assert_close(features.pairs[:1], pairs, rtol=0, atol=1e-5)
    torch.testing.assert_close(features.attributes, attributes, rtol=0, atol=1e-5)
    torch.testing.assert_close(features.objects, objects, rtol=0, atol=1e-5)


def test_only_as_many_positions_as_needed_are_run(small_encoder, space, monkeypatch):
    lengths = []
    encode = small_encoder.encode_embeddings
    monkeypatch.setattr(
        small_encoder, "encode_embeddings", lambda rows, eos: lengths.append(rows.shape[1]) or encode(rows, eos)
    )
    SoftPrompts(small_encoder, space, encode="plain")(space)
    assert lengths == [1 + 3 + 2 + 1, 1 + 3 + 1 + 1, 1 + 3 + 1 + 1]


def test_each_context_hears_from_its_own_prompts_only(small_encoder, space):
    prompts = SoftPrompts(small_encoder, space)
    contexts = [prompts.pair_context, prompts.attribute_context, prompts.object_context]
    for heard, part in enumerate(prompts(space)):
        gradients = torch.autograd.grad(weighted_sum([part]), contexts, retain_graph=True)
        assert [bool(gradient.any()) for gradient in gradients] == [other == heard for other in range(3)]


def test_the_three_contexts_start_equal_and_apart(small_encoder, space):
    prompts = SoftPrompts(small_encoder, space)
    assert torch.equal(prompts.pair_context, prompts.attribute_context)
    assert torch.equal(prompts.pair_context, prompts.object_context)
    pointers = {p.data_ptr() for p in (prompts.pair_context, prompts.attribute_context, prompts.object_context)}
    assert len(pointers) == 3


def test_the_table_is_shared_by_all_prompts(small_encoder, space, generator):
    prompts = SoftPrompts(small_encoder, space)
    before = prompts(space)
    with torch.no_grad():
        prompts.primitives[2] += torch.randn(56, generator=generator)  # "red", an attribute of the third pair
    after = prompts(space)
    changed = [(new - old).abs().amax(dim=1) > 1e-4 for new, old in zip(after, before)]
    assert changed[0].tolist() == [False, False, True]
    assert changed[1].tolist() == [False, False, True]
    assert changed[2].tolist() == [False, False]


def test_dropout_acts_in_training_only(small_encoder, space):
    plain, prompts = SoftPrompts(small_encoder, space), SoftPrompts(small_encoder, space, dropout=0.5)
    torch.testing.assert_close(prompts.eval()(space).pairs, plain(space).pairs, rtol=0, atol=0)
    torch.manual_seed(0)
    first, second = prompts.train()(space).pairs, prompts(space).pairs
    assert not torch.allclose(first, second, atol=1e-4)
    torch.manual_seed(0)
    assert torch.equal(prompts(space).pairs, first)


def test_one_dropout_mask_serves_all_prompts_of_a_step(small_encoder, space):
    prompts = SoftPrompts(small_encoder, space, dropout=0.4).train()
    torch.manual_seed(1)
    dropped = prompts(space.open_world())
    twin = SoftPrompts(small_encoder, space)
    torch.manual_seed(1)
    with torch.no_grad():
        twin.primitives.copy_(F.dropout(prompts.primitives, 0.4))
    for part, expected in zip(dropped, twin(space.open_world())):
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-6)


def test_any_space_over_the_primitives_is_encoded(small_encoder, space):
    prompts = SoftPrompts(small_encoder, space)
    everything = prompts(space.open_world())
    assert everything.pairs.shape == (6, 40)

    @settings(max_examples=25, deadline=None)
    @given(columns=st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
    def check(columns):
        chosen = space.open_world().subset(space.open_world().pairs[columns])
        features = prompts(chosen)
        torch.testing.assert_close(features.pairs, everything.pairs[columns], rtol=0, atol=1e-5)
        torch.testing.assert_close(features.attributes, everything.attributes, rtol=0, atol=0)

    check()


@pytest.mark.parametrize(
    "other",
    [
        CompositionSpace(ATTRIBUTES[::-1], OBJECTS, seen=[("old", "dog")]),
        CompositionSpace(ATTRIBUTES, [*OBJECTS, "cat"], seen=[("old", "dog")]),
        CompositionSpace([name.lower() for name in ATTRIBUTES], OBJECTS, seen=[("old", "dog")]),
    ],
    ids=["order", "more", "case"],
)
def test_a_space_over_other_primitives_raises(small_encoder, space, other):
    with pytest.raises(ValueError, match="`space` over the primitives that these prompts were made for, got others"):
        SoftPrompts(small_encoder, space)(other)


def test_rows_are_of_unit_length(small_encoder, space):
    for part in SoftPrompts(small_encoder, space)(space.open_world()):
        torch.testing.assert_close(part.norm(dim=-1), torch.ones(len(part)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 5, 6, 7])
def test_encoding_in_chunks_changes_nothing(small_encoder, space, monkeypatch, rows):
    prompts = SoftPrompts(small_encoder, space)
    at_once = prompts(space.open_world())
    monkeypatch.setattr(soft, "_ROWS", rows)
    with torch.no_grad():
        for part, expected in zip(prompts(space.open_world()), at_once):
            torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)


def test_without_gradients_no_chunk_exceeds_its_size(small_encoder, space, monkeypatch):
    sizes = []
    encode = small_encoder.encode_embeddings
    prompts = SoftPrompts(small_encoder, space, encode="plain")
    monkeypatch.setattr(soft, "_ROWS", 4)
    monkeypatch.setattr(
        small_encoder, "encode_embeddings", lambda rows, eos: sizes.append(len(rows)) or encode(rows, eos)
    )
    with torch.no_grad():
        prompts(space.open_world())
    assert sizes == [4, 2, 3, 2]
    sizes.clear()
    prompts(space.open_world())
    assert sizes == [6, 3, 2]


def test_the_encoder_is_used_and_not_owned(small_encoder, space):
    prompts = SoftPrompts(small_encoder, space)
    names = ["pair_context", "attribute_context", "object_context", "primitives"]
    assert [name for name, _ in prompts.named_parameters()] == names
    assert list(prompts.state_dict()) == names
    assert len(list(prompts.modules())) == 1
    weighted_sum(prompts(space)).backward()
    assert all(p.grad is None for p in small_encoder.parameters())
    assert all(p.grad is not None for p in prompts.parameters())


def test_changes_to_the_encoder_are_seen(small_encoder, space):
    prompts = SoftPrompts(small_encoder, space)
    before = prompts(space).pairs
    with torch.no_grad():
        small_encoder.model.text_projection.mul_(-1)
    torch.testing.assert_close(prompts(space).pairs, -before, rtol=0, atol=1e-6)


def test_a_state_dict_carries_everything_that_was_learned(small_encoder, space, generator):
    prompts, fresh = SoftPrompts(small_encoder, space), SoftPrompts(small_encoder, space)
    with torch.no_grad():
        for parameter in prompts.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    assert not torch.allclose(fresh(space).pairs, prompts(space).pairs, atol=1e-3)
    fresh.load_state_dict(prompts.state_dict())
    for part, expected in zip(fresh(space), prompts(space)):
        assert torch.equal(part, expected)


def test_a_copy_is_independent(small_encoder, space):
    prompts = SoftPrompts(small_encoder, space)
    twin = copy.deepcopy(prompts)
    with torch.no_grad():
        twin.pair_context.zero_()
    assert not torch.allclose(twin(space).pairs, prompts(space).pairs, atol=1e-4)
    assert torch.equal(twin(space).attributes, prompts(space).attributes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_prompts_follow_a_move_to_another_dtype(small_encoder, space, dtype):
    prompts = SoftPrompts(small_encoder, space)
    expected = prompts(space).pairs
    prompts.to(dtype)
    small_encoder.to(dtype)
    moved = prompts(space).pairs
    assert moved.dtype == dtype
    bound = 0.05 if dtype is torch.bfloat16 else 1e-5  # bf16 keeps 8 bits of rows of length one
    torch.testing.assert_close(moved.float(), expected, rtol=0, atol=bound)


def test_prompts_follow_a_move_to_another_device(small_encoder, space):
    prompts = SoftPrompts(small_encoder, space).to("meta")
    small_encoder.to("meta")
    features = prompts(space)
    assert all(part.device.type == "meta" for part in features)
    assert [tuple(part.shape) for part in features] == [(3, 40), (3, 40), (2, 40)]


def test_prompts_run_under_autocast(small_encoder, space):
    prompts = SoftPrompts(small_encoder, space)
    with torch.autocast("cpu", torch.bfloat16):
        features = prompts(space)
        weighted_sum(features).backward()
    torch.testing.assert_close(features.pairs.float(), prompts(space).pairs, rtol=0, atol=0.05)
    assert prompts.primitives.grad.dtype == torch.float32


def test_prompts_train_towards_a_target(small_encoder, space):
    prompts = SoftPrompts(small_encoder, space)
    target = F.normalize(torch.randn(3, 40, generator=torch.Generator().manual_seed(0)), dim=-1)
    optimizer = torch.optim.Adam(prompts.parameters(), lr=0.02)
    losses = []
    for _ in range(10):
        loss = -(prompts(space).pairs * target).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("dropout", [-0.1, 1.1, float("nan")])
def test_a_dropout_out_of_range_raises(small_encoder, space, dropout):
    with pytest.raises(ValueError, match=r"expected `dropout` to be in \[0, 1\], got"):
        SoftPrompts(small_encoder, space, dropout=dropout)


def test_arguments_of_another_kind_are_told(small_encoder, space):
    with pytest.raises(TypeError, match="expected `encoder` to be an Encoder, as `wrap` returns, got CLIP without `"):
        SoftPrompts(small_encoder.model, space)
    with pytest.raises(TypeError, match="expected `space` to be a CompositionSpace, got list"):
        SoftPrompts(small_encoder, ATTRIBUTES)
    with pytest.raises(TypeError, match="expected `space` to be a CompositionSpace, got Tensor"):
        SoftPrompts(small_encoder, space)(space.pairs)


def test_an_unknown_way_of_encoding_raises(small_encoder, space):
    with pytest.raises(ValueError, match="expected `encode` to be one of auto, prefix, plain, got 'fast'"):
        SoftPrompts(small_encoder, space, encode="fast")


@pytest.mark.parametrize("text", [{}, {"no_causal_mask": True}], ids=["causal", "two_way"])
@pytest.mark.parametrize("words", [74, 75, 76])
def test_a_context_that_leaves_no_room_for_a_pair_raises(small_clip_factory, space, text, words):
    encoder = wrap(small_clip_factory(text=text))
    with pytest.raises(ValueError, match="of at most 77 tokens, got"):
        SoftPrompts(encoder, space, context=" ".join(["dog"] * words))


@pytest.mark.parametrize("text", [{}, {"no_causal_mask": True}], ids=["causal", "two_way"])
def test_a_context_that_leaves_just_enough_room_is_taken(small_clip_factory, space, text):
    encoder = wrap(small_clip_factory(text=text))
    context = " ".join(["dog"] * 73)
    features = SoftPrompts(encoder, space, context=context)(space)
    expected = F.normalize(encoder.encode_texts([f"{context} red dog"]), dim=-1)
    torch.testing.assert_close(features.pairs[2:], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", ["first", "last"])
def test_a_tower_that_pools_a_fixed_place_takes_prompts_of_its_whole_context(small_clip_factory, space, pool):
    encoder = wrap(small_clip_factory(text={"pool_type": pool, "no_causal_mask": True}))
    features = SoftPrompts(encoder, space, context="a photo of")(space)
    expected = F.normalize(encoder.encode_texts(["a photo of red dog"]), dim=-1)
    torch.testing.assert_close(features.pairs[2:], expected, rtol=0, atol=1e-5)


def test_texts_whose_end_cannot_be_found_raise(small_clip_factory, space):
    def in_front(texts):  # pads there, so that all texts seem to end where they start
        return torch.tensor([[0] * (77 - len(text)) + [1] * len(text) for text in texts])

    encoder = wrap(small_clip_factory(text={"pool_type": "last", "no_causal_mask": True}), tokenizer=in_front)
    with pytest.raises(ValueError, match=r"with a text tower pooled at \[EOS\], got one pooled elsewhere"):
        SoftPrompts(encoder, space)


def test_prompts_of_pairs_are_those_of_the_space(small_encoder, space):
    prompts = SoftPrompts(small_encoder, space)
    for one, other in zip(prompts(space), prompts.texts(space.pairs)):
        assert torch.equal(one, other)
    alone = SoftPrompts(small_encoder, space, span="pairs").texts(space.pairs)
    # Contexts are run together, which rounds otherwise.
    torch.testing.assert_close(alone.pairs, prompts(space).pairs, rtol=0, atol=1e-6)
    assert alone.attributes.shape == alone.objects.shape == (0, 40)


@pytest.mark.parametrize("span", ["pairs", "all"])
def test_either_span_is_called_with_a_space_too(small_encoder, space, span):
    prompts = SoftPrompts(small_encoder, space, span=span)
    for one, other in zip(prompts(space), prompts.texts(space.pairs)):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="`space` over the primitives that these prompts were made for"):
        prompts(CompositionSpace(["old"], ["cat"], seen=[(0, 0)]))


@pytest.mark.parametrize("encode", ["prefix", "plain"])
@pytest.mark.parametrize("span", ["pairs", "all"])
def test_pairs_may_come_in_any_order_and_twice(small_encoder, space, span, encode):
    prompts = SoftPrompts(small_encoder, space, span=span, encode=encode)
    order = [2, 0, 2, 1]
    texts, others = prompts.texts(space.pairs), prompts.texts(space.pairs[order])
    torch.testing.assert_close(others.pairs, texts.pairs[order], rtol=0, atol=1e-6)
    for one, other in zip(texts[1:], others[1:]):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_pairs_that_cannot_be_right_are_refused(small_encoder, space):
    prompts = SoftPrompts(small_encoder, space)
    with pytest.raises(TypeError, match=r"`pairs` of dtype torch\.int64, got torch\.float32"):
        prompts.texts(space.pairs.float())
    with pytest.raises(ValueError, match=r"`pairs` of shape \(pairs, 2\)"):
        prompts.texts(space.pairs[:, :1])
    with pytest.raises(ValueError, match="`pairs` with at least one row, got none"):
        prompts.texts(space.pairs[:0])
    for wrong in ([[0, 2]], [[-1, 0]], [[0, 0], [3, 1]]):
        with pytest.raises(ValueError, match=r"`pairs` of indices below \(3, 2\), got"):
            prompts.texts(torch.tensor(wrong))


def test_prompts_of_pairs_alone_learn_no_other_context(small_encoder, space):
    prompts = SoftPrompts(small_encoder, space, span="pairs")
    assert set(prompts.state_dict()) == {"pair_context", "primitives"}
    prompts.texts(space.pairs).pairs.sum().backward()
    assert all(parameter.grad.any() for parameter in prompts.parameters())


def test_a_table_takes_the_place_of_names(small_encoder, space, generator):
    table = torch.randn(5, 56, generator=generator)
    prompts = SoftPrompts(small_encoder, space, primitives=table)
    assert torch.equal(prompts.primitives, table)
    assert prompts.primitives.data_ptr() != table.data_ptr()
    assert (prompts.attributes, prompts.objects) == (space.attributes, space.objects)
    named = SoftPrompts(small_encoder, space)
    same = SoftPrompts(small_encoder, space, primitives=named.primitives)
    assert torch.equal(named.texts(space.pairs).pairs, same.texts(space.pairs).pairs)


def test_a_table_that_does_not_fit_is_refused(small_encoder, space):
    for shape in ((4, 56), (5, 40)):
        with pytest.raises(ValueError, match=r"`primitives` of shape \(5, 56\)"):
            SoftPrompts(small_encoder, space, primitives=torch.zeros(shape))
    with pytest.raises(TypeError, match=r"`primitives` to be a torch\.Tensor, got list"):
        SoftPrompts(small_encoder, space, primitives=[0.0])


def test_names_too_long_for_the_context_are_refused_without_a_table(small_encoder):
    space = CompositionSpace(["a " * 90], ["dog"], seen=[(0, 0)])
    with pytest.raises(ValueError, match="`texts` of at most 77 tokens"):
        SoftPrompts(small_encoder, space)
    SoftPrompts(small_encoder, space, primitives=torch.zeros(2, 56))


@pytest.mark.parametrize("span", ["pairs", "all"])
def test_all_prompts_of_a_call_share_one_dropout_mask(small_encoder, space, span):
    prompts = SoftPrompts(small_encoder, space, span=span, dropout=0.5).train()
    pairs = torch.tensor([[0, 1], [2, 0], [0, 1]])
    torch.manual_seed(0)
    texts = prompts.texts(pairs)
    assert torch.equal(texts.pairs[0], texts.pairs[2])
    torch.manual_seed(0)
    with torch.no_grad():
        prompts.primitives.copy_(F.dropout(prompts.primitives, 0.5))
    for one, other in zip(texts, prompts.eval().texts(pairs)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_dropout_at_evaluation_does_not_stop(small_encoder, space):
    clean, dropping = (
        SoftPrompts(small_encoder, space, dropout=0.5, dropout_at_evaluation=late).eval() for late in (False, True)
    )
    assert torch.equal(clean(space).pairs, clean(space).pairs)
    torch.manual_seed(0)
    first = dropping(space).pairs
    assert not torch.allclose(first, dropping(space).pairs, atol=1e-4)
    torch.manual_seed(0)
    assert torch.equal(dropping.train()(space).pairs, first)


def test_switches_and_spans_are_checked(small_encoder, space):
    for name in ("dropout_at_evaluation", "checkpoint"):
        with pytest.raises(TypeError, match=f"`{name}` to be a bool, got str"):
            SoftPrompts(small_encoder, space, **{name: "no"})
    with pytest.raises(ValueError, match="`span` to be one of pairs, all, got 'objects'"):
        SoftPrompts(small_encoder, space, span="objects")
    with pytest.raises(TypeError, match="`context` to be a str, got NoneType"):
        SoftPrompts(small_encoder, space, context=None)


@pytest.mark.parametrize("encode", ["prefix", "plain"])
def test_words_stand_for_names(small_encoder, space, encode):
    worded = space.with_words({"Wet": "soaking wet", "circle": "round thing"})
    meant = CompositionSpace(["old", "soaking wet", "red"], ["dog", "round thing"], seen=space.pairs)
    written, expected = (SoftPrompts(small_encoder, each, encode=encode) for each in (worded, meant))
    assert torch.equal(written.primitives, expected.primitives)
    assert not torch.equal(written.primitives, SoftPrompts(small_encoder, space).primitives)
    for part, same in zip(written(worded), expected(meant)):
        assert torch.equal(part, same)
    assert torch.equal(written(worded.open_world()).pairs, expected(meant.open_world()).pairs)
