"""Prompts for pairs given as indices, and the seam where tokens meet texts."""

import pytest
import torch
import torch.nn.functional as F

from baselines.csp import CSP
from baselines.method import Seam
from baselines.prompts import PairPrompts
from czsl_heads import CompositionSpace, SparseAlignHead, wrap
from czsl_heads.prompts.soft import SoftPrompts

SPACE = CompositionSpace(["red", "Dark.Blue", "striped"], ["circle", "star"], seen=[(0, 1), (2, 0)], unseen=[(1, 1)])


@pytest.fixture(scope="module")
def encoder():
    return wrap("tiny")


def test_prompts_of_pairs_are_those_of_the_space(encoder):
    soft, prompts = SoftPrompts(encoder, SPACE), PairPrompts(encoder, SPACE, span="all")
    for one, other in zip(soft(SPACE), prompts.texts(SPACE.pairs)):
        assert torch.equal(one, other)
    alone = PairPrompts(encoder, SPACE).texts(SPACE.pairs)
    torch.testing.assert_close(alone.pairs, soft(SPACE).pairs)  # contexts are run together, which rounds otherwise
    assert alone.attributes.shape == alone.objects.shape == (0, 96)


def test_prompts_are_called_with_a_space_too(encoder):
    for span in ("pairs", "all"):
        prompts = PairPrompts(encoder, SPACE, span=span)
        for one, other in zip(prompts(SPACE), prompts.texts(SPACE.pairs)):
            assert torch.equal(one, other)
        with pytest.raises(ValueError, match="`space` over the primitives that these prompts were made for"):
            prompts(CompositionSpace(["old"], ["cat"], seen=[(0, 0)]))


def test_switches_and_choices_are_checked(encoder):
    with pytest.raises(TypeError, match="`half_logits` to be a bool"):
        Seam(half_logits="no")
    with pytest.raises(TypeError, match="`dropout_at_evaluation` to be a bool"):
        PairPrompts(encoder, SPACE, dropout_at_evaluation="no")
    with pytest.raises(ValueError, match="`span` to be one of pairs, all"):
        PairPrompts(encoder, SPACE, span="objects")


def test_prompts_of_pairs_alone_learn_no_other_context(encoder):
    assert set(PairPrompts(encoder, SPACE).state_dict()) == {"pair_context", "primitives"}
    assert set(PairPrompts(encoder, SPACE, span="all").state_dict()) == set(SoftPrompts(encoder, SPACE).state_dict())


def test_a_table_takes_the_place_of_names(encoder):
    table = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    prompts = PairPrompts(encoder, SPACE, primitives=table)
    assert torch.equal(prompts.primitives, table)
    assert prompts.primitives.data_ptr() != table.data_ptr()
    assert (prompts.attributes, prompts.objects) == (SPACE.attributes, SPACE.objects)
    named = PairPrompts(encoder, SPACE)
    same = PairPrompts(encoder, SPACE, primitives=named.primitives)
    assert torch.equal(named.texts(SPACE.pairs).pairs, same.texts(SPACE.pairs).pairs)


def test_all_prompts_of_a_call_share_one_dropout_mask(encoder):
    prompts = PairPrompts(encoder, SPACE, dropout=0.5).train()
    pairs = torch.tensor([[0, 1], [2, 0], [0, 1]])
    torch.manual_seed(0)
    texts = prompts.texts(pairs).pairs
    assert torch.equal(texts[0], texts[2])
    torch.manual_seed(0)
    with torch.no_grad():
        prompts.primitives.copy_(F.dropout(prompts.primitives, 0.5))
    torch.testing.assert_close(texts, prompts.eval().texts(pairs).pairs)


def test_dropout_at_evaluation_is_asked_for_by_name(encoder):
    images = torch.zeros(1, 3, 48, 48)
    clean, dropping = (
        CSP(encoder, SPACE, dropout=0.5, dropout_at_evaluation=late, official=True).eval() for late in (False, True)
    )
    assert torch.equal(clean.scores(images, SPACE.pairs), clean.scores(images, SPACE.pairs))
    torch.manual_seed(0)
    first, second = dropping.scores(images, SPACE.pairs), dropping.scores(images, SPACE.pairs)
    assert not torch.equal(first, second)


def test_the_seam_is_the_scaled_head():
    generator = torch.Generator().manual_seed(0)
    tokens, shared = torch.randn(5, 7, 11, generator=generator), torch.randn(3, 11, generator=generator)
    for texts in (shared, torch.randn(5, 3, 11, generator=generator)):
        cosines = F.cosine_similarity(tokens[:, :, None], texts if texts.ndim == 2 else texts[:, None], dim=-1)
        scale = torch.tensor(30.0)
        torch.testing.assert_close(Seam()(tokens, texts, scale), 30 * cosines[:, 0])
        for head in (SparseAlignHead(), SparseAlignHead(logit_scale=2.0)):
            torch.testing.assert_close(Seam(head)(tokens, texts, scale), 30 * cosines.amax(1))
        without = Seam(SparseAlignHead(include_cls=False))(tokens, texts, scale)
        torch.testing.assert_close(without, 30 * cosines[:, 1:].amax(1))
    assert not Seam().takes_tokens
    assert Seam(SparseAlignHead("mean")).takes_tokens


def test_half_logits_tie_where_the_released_code_ties():
    tokens = torch.tensor([[[1.0, 0.0]]])
    texts = F.normalize(torch.tensor([[0.3, 1.0], [0.30001, 1.0], [0.4, 1.0]]), dim=1)
    scale = torch.tensor(100.0, requires_grad=True)
    wide, half = (Seam(half_logits=half)(tokens, texts, scale) for half in (False, True))
    assert wide[0, 0] < wide[0, 1] < wide[0, 2]
    assert half[0, 0] == half[0, 1] < half[0, 2]
    assert half.dtype == torch.float32
    assert torch.equal(half, wide.half().float())
    half.sum().backward()
    assert scale.grad > 0


def test_a_head_with_parameters_is_trained_with_the_method(encoder):
    csp = CSP(encoder, SPACE, align=SparseAlignHead("linear", dim=96))
    csp.loss(torch.ones(2, 3, 48, 48), SPACE.pairs, torch.tensor([0, 2])).backward()
    assert csp.seam.head.pool.score.weight.grad.any()


def test_names_too_long_for_the_context_are_refused_without_a_table(encoder):
    space = CompositionSpace(["a " * 90], ["dog"], seen=[(0, 0)])
    with pytest.raises(ValueError, match="`texts` of at most 77 tokens"):
        PairPrompts(encoder, space)
    PairPrompts(encoder, space, primitives=torch.zeros(2, 96))
