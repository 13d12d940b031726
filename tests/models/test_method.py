"""The seam where tokens meet texts, and what a method gets for one of its own that only says its texts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baselines.csp import CSP
from czsl_heads import CompositionSpace, SparseAlignHead, wrap
from czsl_heads.models.method import Method, Seam, cross_entropies, tokens_of
from czsl_heads.prompts.soft import TextFeatures
from tests.models.shared import PAIRS, SEEN, TARGETS, make_images, make_space

SPACE = CompositionSpace(["red", "Dark.Blue", "striped"], ["circle", "star"], seen=[(0, 1), (2, 0)], unseen=[(1, 1)])


@pytest.fixture(scope="module")
def encoder():
    return wrap("tiny")


class Table(Method):
    """A method of its own: a row for each pair, and for some kinds of primitives."""

    def __init__(self, encoder, space, kinds=("attributes", "objects"), **options):
        super().__init__(encoder, space, **options)
        generator = torch.Generator().manual_seed(3)
        sizes = {name: len(getattr(space, name)) for name in kinds}
        self.rows = nn.ParameterDict(
            {name: torch.randn(size, encoder.dim, generator=generator) for name, size in sizes.items()}
        )
        self.of_pairs = nn.Parameter(torch.randn(3, 2, encoder.dim, generator=generator))

    def texts(self, pairs):
        of_pairs = F.normalize(self.of_pairs[pairs[:, 0], pairs[:, 1]], dim=1)
        units = {name: F.normalize(rows, dim=1) for name, rows in self.rows.items()}
        return TextFeatures(of_pairs, units.get("attributes", of_pairs[:0]), units.get("objects", of_pairs[:0]))


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


def test_one_token_stands_for_the_image_whatever_the_head():
    generator = torch.Generator().manual_seed(0)
    token, texts = torch.randn(5, 1, 11, generator=generator), torch.randn(3, 11, generator=generator)
    for head in (SparseAlignHead(include_cls=False), SparseAlignHead("linear", dim=11)):
        assert torch.equal(Seam(head)(token, texts, torch.tensor(30.0)), Seam()(token, texts, torch.tensor(30.0)))


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


def test_switches_of_the_seam_are_checked():
    with pytest.raises(TypeError, match="`half_logits` to be a bool"):
        Seam(half_logits="no")
    with pytest.raises(ValueError, match="`align` to be one of cls, got 'max'"):
        Seam("max")
    with pytest.raises(TypeError, match="`align` to be a SparseAlignHead, got NoneType"):
        Seam(None)


def test_a_head_with_parameters_is_trained_with_the_method(encoder):
    csp = CSP(encoder, SPACE, align=SparseAlignHead("linear", dim=96))
    csp.loss(torch.ones(2, 3, 48, 48), SPACE.pairs, torch.tensor([0, 2])).backward()
    assert csp.seam.head.pool.score.weight.grad.any()


def test_dropout_at_evaluation_is_asked_for_by_name(encoder):
    images = torch.zeros(1, 3, 48, 48)
    clean, dropping = (
        CSP(encoder, SPACE, dropout=0.5, dropout_at_evaluation=late, official=True).eval() for late in (False, True)
    )
    assert torch.equal(clean.scores(images, SPACE.pairs), clean.scores(images, SPACE.pairs))
    torch.manual_seed(0)
    first, second = dropping.scores(images, SPACE.pairs), dropping.scores(images, SPACE.pairs)
    assert not torch.equal(first, second)


def test_a_method_of_its_own_needs_no_more_than_texts(encoder):
    table, images = Table(encoder, make_space(), align=SparseAlignHead()), make_images()
    logits, texts, tokens = table(images, PAIRS), table.texts(PAIRS), encoder.encode_tokens(images)
    for rows, features in zip(logits, texts):
        cosines = F.normalize(tokens, dim=-1) @ features.T
        torch.testing.assert_close(rows, encoder.logit_scale * cosines.amax(dim=1), atol=1e-4, rtol=0)
    table.loss(images, SEEN, TARGETS).backward()
    assert all(parameter.grad.any() for parameter in [table.of_pairs, *table.rows.values()])
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_a_method_that_says_no_texts_is_not_implemented(encoder):
    with pytest.raises(NotImplementedError):
        Method(encoder, make_space()).texts(PAIRS)


def test_a_branch_that_is_not_there_has_no_columns_and_no_loss(encoder):
    both, attributes, none = (
        Table(encoder, make_space(), kinds) for kinds in (("attributes", "objects"), ("attributes",), ())
    )
    images, columns = make_images(), []
    for table in (both, attributes, none):
        logits = table(images, SEEN)
        columns.append([rows.shape[1] for rows in logits])
        losses = table.losses(logits, SEEN, TARGETS)
        terms = [losses.pop(name) for name in list(losses) if name != "loss"]
        torch.testing.assert_close(losses["loss"], sum(terms))
        assert len(terms) == sum(count > 0 for count in columns[-1])
    assert columns == [[3, 3, 2], [3, 3, 0], [3, 0, 0]]


def test_cross_entropies_look_up_the_primitives_of_each_target(encoder):
    logits = Table(encoder, make_space())(make_images(), PAIRS)
    targets = torch.tensor([3, 0, 3, 1, 2, 2])
    terms = cross_entropies(logits, PAIRS, targets)
    for name, rows, wanted in zip(("pairs", "attrs", "objs"), logits, (targets, *PAIRS[targets].unbind(1))):
        picked = -rows.log_softmax(dim=1)[torch.arange(6), wanted].mean()
        torch.testing.assert_close(terms[f"loss_{name}"], picked)


def test_tokens_are_found_in_what_an_encoder_adds_to_them():
    tokens = torch.zeros(1, 2, 3)
    assert tokens_of(tokens) is tokens
    assert tokens_of((tokens, "more")) is tokens
