from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from czsl_heads.functional import aligned_vectors, alignment
from czsl_heads.functional.alignment import REDUCTIONS
from tests.references import reference_alignment

REDUCTION_OPTIONS = [
    {"reduce": "max"},
    {"reduce": "topk", "k": 3},
    {"reduce": "logsumexp", "temperature": 0.1},
    {"reduce": "mean"},
    {"reduce": "cls"},
]
each_reduction = pytest.mark.parametrize("options", REDUCTION_OPTIONS, ids=lambda options: options["reduce"])


def draw(batch=2, tokens=7, texts=3, dim=5, *, per_image=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text_shape = (batch, texts, dim) if per_image else (texts, dim)
    return (
        torch.randn(batch, tokens, dim, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(text_shape, generator=generator, dtype=torch.float64).to(dtype),
    )


def test_every_reduction_is_tried():
    assert tuple(options["reduce"] for options in REDUCTION_OPTIONS) == REDUCTIONS


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(2, 7), st.integers(1, 5), st.integers(1, 7)),
    reduce=st.sampled_from(REDUCTIONS),
    temperature=st.sampled_from([0.01, 0.1, 1.0]),
    include_cls=st.booleans(),
    cls_weight=st.sampled_from([0.0, 0.3, 1.0]),
    per_image=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_alignment_equals_its_formula(sizes, reduce, temperature, include_cls, cls_weight, per_image, seed, data):
    tokens, texts = draw(*sizes, per_image=per_image, seed=seed)
    options = {"reduce": reduce, "include_cls": include_cls, "cls_weight": cls_weight, "temperature": temperature}
    options["k"] = data.draw(st.integers(1, sizes[1] - (not include_cls)))
    torch.testing.assert_close(alignment(tokens, texts, **options), reference_alignment(tokens, texts, **options))


def test_hand_sized_values():
    tokens = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]])
    text = torch.tensor([[5.0, 0.0]])  # cosines 1, 0 and -1
    for options, expected in (
        ({"reduce": "max"}, 1.0),
        ({"reduce": "max", "include_cls": False}, 0.0),
        ({"reduce": "topk", "k": 2}, 0.5),
        ({"reduce": "mean"}, 0.0),
        ({"reduce": "mean", "include_cls": False}, -0.5),
        ({"reduce": "cls"}, 1.0),
        ({"reduce": "mean", "include_cls": False, "cls_weight": 0.2}, -0.2),
    ):
        torch.testing.assert_close(alignment(tokens, text, **options), torch.tensor([[expected]]))


@each_reduction
def test_scale_of_the_inputs_does_not_matter(options):
    tokens, texts = draw()
    token_scale = torch.logspace(-3, 3, 7, dtype=torch.float64)[:, None]
    text_scale = torch.tensor([[0.01], [1.0], [1e4]])
    scaled = alignment(tokens * token_scale, texts * text_scale, cls_weight=0.3, **options)
    torch.testing.assert_close(scaled, alignment(tokens, texts, cls_weight=0.3, **options))


@each_reduction
@given(seed=st.integers(0, 2**31), tokens=st.integers(3, 11))
@settings(deadline=None, max_examples=10)
def test_scores_are_cosines(options, seed, tokens):
    scores = alignment(*draw(tokens=tokens, dim=2, seed=seed), **options)
    assert (scores.abs() <= 1 + 1e-12).all()


@each_reduction
def test_order_of_patches_does_not_matter(options):
    tokens, texts = draw()
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(6, generator=torch.manual_seed(0))])
    torch.testing.assert_close(
        alignment(tokens[:, order], texts, cls_weight=0.3, **options),
        alignment(tokens, texts, cls_weight=0.3, **options),
    )


@each_reduction
def test_order_of_texts_is_that_of_the_scores(options):
    tokens, texts = draw()
    torch.testing.assert_close(alignment(tokens, texts.flip(0), **options), alignment(tokens, texts, **options).flip(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logsumexp_tends_to_the_maximum(dtype):
    tokens, texts = draw(dtype=dtype)
    temperature = 1e-6
    gap = alignment(tokens, texts) - alignment(tokens, texts, reduce="logsumexp", temperature=temperature)
    # The maximum is at most T log L above, and exactly so where the best token is far ahead.
    torch.testing.assert_close(gap, torch.full_like(gap, temperature * torch.tensor(7.0).log()), atol=1e-6, rtol=0)


def test_logsumexp_tends_to_the_mean():
    tokens, texts = draw()
    mean = alignment(tokens, texts, reduce="mean")
    for temperature in (1e2, 1e4, 1e6):
        gap = alignment(tokens, texts, reduce="logsumexp", temperature=temperature) - mean
        assert (gap.abs() <= 0.5 / temperature + 1e-8).all()  # half the variance over T, and cosines vary by at most 1


@given(low=st.floats(0.005, 5), factor=st.floats(1.1, 10), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_logsumexp_falls_with_temperature_from_maximum_to_mean(low, factor, seed):
    tokens, texts = draw(seed=seed)
    colder, warmer = (
        alignment(tokens, texts, reduce="logsumexp", temperature=temperature) for temperature in (low, low * factor)
    )
    ordered = [alignment(tokens, texts), colder, warmer, alignment(tokens, texts, reduce="mean")]
    for above, below in pairwise(ordered):
        assert (above >= below - 1e-12).all()


@pytest.mark.parametrize("include_cls", [True, False])
def test_topk_spans_from_maximum_to_mean(include_cls):
    tokens, texts = draw()
    one = alignment(tokens, texts, reduce="topk", k=1, include_cls=include_cls)
    assert torch.equal(one, alignment(tokens, texts, include_cls=include_cls))
    every = alignment(tokens, texts, reduce="topk", k=7 if include_cls else 6, include_cls=include_cls)
    torch.testing.assert_close(every, alignment(tokens, texts, reduce="mean", include_cls=include_cls))


@each_reduction
def test_excluding_cls_is_slicing(options):
    tokens, texts = draw()
    excluded = alignment(tokens, texts, include_cls=False, **options)
    sliced = tokens if options["reduce"] == "cls" else tokens[:, 1:]
    torch.testing.assert_close(excluded, alignment(sliced, texts, **options))


@each_reduction
@pytest.mark.parametrize("include_cls", [True, False])
def test_the_blend_is_linear(options, include_cls):
    tokens, texts = draw()
    options = {**options, "include_cls": include_cls}
    cls, reduced = alignment(tokens, texts, reduce="cls"), alignment(tokens, texts, **options)
    blended = alignment(tokens, texts, cls_weight=0.3, **options)
    torch.testing.assert_close(blended, 0.7 * reduced + 0.3 * cls)
    assert torch.equal(alignment(tokens, texts, cls_weight=1, **options), cls)


@each_reduction
def test_one_token_is_its_cosine(options):
    tokens, texts = draw(tokens=1)
    options = {**options, **({"k": 1} if "k" in options else {})}
    expected = torch.nn.functional.cosine_similarity(tokens, texts[None], dim=-1)
    torch.testing.assert_close(alignment(tokens, texts, **options), expected)


@each_reduction
def test_zero_vectors_score_zero(options):
    tokens, texts = draw()
    assert not alignment(torch.zeros_like(tokens), texts, **options).any()
    assert not alignment(tokens, torch.zeros_like(texts), **options).any()


@each_reduction
def test_nan_propagates_to_its_own_image_only(options):
    tokens, texts = draw()
    tokens[1, 0, 2] = torch.nan
    scores = alignment(tokens, texts, **options)
    assert scores[1].isnan().all()
    assert scores[0].isfinite().all()


@each_reduction
@pytest.mark.parametrize("per_image", [False, True])
def test_gradients_are_right(options, per_image):
    inputs = [tensor.requires_grad_() for tensor in draw(per_image=per_image)]
    assert torch.autograd.gradcheck(lambda *args: alignment(*args, cls_weight=0.3, **options), inputs)


@each_reduction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(options, dtype):
    tokens, texts = draw(dim=67, dtype=dtype)
    scores = alignment(tokens, texts, **options)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, alignment(tokens.float(), texts.float(), **options))


@each_reduction
def test_autocast_changes_nothing(options):
    tokens, texts = draw(dim=67, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = alignment(tokens, texts, cls_weight=0.3, **options)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, alignment(tokens, texts, cls_weight=0.3, **options))


class Alignment(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def forward(self, tokens, texts):
        return alignment(tokens, texts, **self.options)


@each_reduction
def test_alignment_exports_with_any_batch_tokens_and_texts(options):
    names = {"tokens": ("batch", "tokens"), "texts": ("texts",)}
    sizes = {name: dict.fromkeys(range(len(axes)), torch.export.Dim.DYNAMIC) for name, axes in names.items()}
    module = Alignment({**options, "cls_weight": 0.3})
    program = torch.export.export(module, draw(dtype=torch.float32), dynamic_shapes=sizes)
    for shape in ((2, 7, 3), (5, 13, 11)):
        tokens, texts = draw(*shape, dtype=torch.float32, seed=1)
        torch.testing.assert_close(program.module()(tokens, texts), module(tokens, texts))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": "image"}, TypeError, r"expected `tokens` to be a torch.Tensor, got str"),
        ({"texts": torch.zeros(3, 5, dtype=torch.bool)}, TypeError, r"expected `texts` of dtype .*got torch.bool"),
        ({"tokens": torch.zeros(2, 5)}, ValueError, r"expected `tokens` of shape \(batch, tokens, dim\), got \(2, 5\)"),
        ({"texts": torch.zeros(3, 11)}, ValueError, r"expected `texts` of shape .*dim=5, got \(3, 11\)"),
        ({"texts": torch.zeros(3, 3, 5)}, ValueError, r"expected `texts` of shape .*batch=2.*, got \(3, 3, 5\)"),
        ({"reduce": "median"}, ValueError, r"expected `reduce` to be one of max, .*got 'median'"),
        ({"cls_weight": -0.1}, ValueError, r"expected `cls_weight` to be in \[0, 1\], got -0.1"),
        ({"cls_weight": 1.1}, ValueError, r"expected `cls_weight` to be in \[0, 1\], got 1.1"),
        ({"reduce": "topk"}, ValueError, r'expected `k` with reduce="topk", got None'),
        ({"reduce": "topk", "k": 8}, ValueError, r"expected `k` to be in \[1, 7\], got 8"),
        ({"reduce": "topk", "k": 7, "include_cls": False}, ValueError, r"expected `k` to be in \[1, 6\], got 7"),
        ({"reduce": "topk", "k": 0}, ValueError, r"expected `k` to be in \[1, 7\], got 0"),
        ({"reduce": "logsumexp", "temperature": 0.0}, ValueError, r"`temperature` to be positive and finite, got 0.0"),
        ({"reduce": "logsumexp", "temperature": float("inf")}, ValueError, r"`temperature` .*finite, got inf"),
        ({"tokens": torch.zeros(2, 1, 5), "include_cls": False}, ValueError, r"`tokens` with patches .*got 1 token"),
        ({"tokens": torch.zeros(2, 0, 5)}, ValueError, r"expected `tokens` with at least one token, got 0"),
        ({"tokens": torch.zeros(2, 0, 5), "reduce": "cls"}, ValueError, r"`tokens` with at least one token, got 0"),
        ({"tokens": torch.zeros(2, 0, 5), "include_cls": False}, ValueError, r"with at least one token, got 0"),
        ({"reduce": "topk", "k": 1.5}, TypeError, r"expected `k` to be an integer, got 1.5"),
        ({"reduce": "logsumexp", "temperature": "a"}, TypeError, r"expected `temperature` to be a number, got 'a'"),
        ({"cls_weight": None}, TypeError, r"expected `cls_weight` to be a number, got None"),
        ({"cls_weight": float("nan")}, ValueError, r"expected `cls_weight` to be in \[0, 1\], got nan"),
    ],
)
def test_wrong_arguments_are_told(change, error, message):
    tokens, texts = draw(dtype=torch.float32)
    with pytest.raises(error, match=message):
        alignment(**{"tokens": tokens, "texts": texts, **change})


@pytest.mark.parametrize("include_cls", [True, False])
@pytest.mark.parametrize("cls_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("reduce", "k"), [("max", None), ("topk", 3), ("logsumexp", None), ("mean", None), ("cls", None)]
)
def test_aligned_vectors_are_the_gradient_of_the_score_by_the_text(reduce, k, cls_weight, include_cls):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64)
    texts = torch.nn.functional.normalize(torch.randn(3, 5, generator=generator, dtype=torch.float64), dim=1)
    options = {"reduce": reduce, "k": k, "temperature": 0.2, "cls_weight": cls_weight, "include_cls": include_cls}
    found = aligned_vectors(tokens, texts, **options)
    texts.requires_grad_()
    scores = alignment(tokens, texts[:, None], **options)
    (gradient,) = torch.autograd.grad(scores.sum(), texts)
    # The score normalises the text, so that its gradient lies across it.
    along = (found * texts).sum(dim=1, keepdim=True) * texts
    torch.testing.assert_close(found - along, gradient)
    if reduce != "logsumexp":
        torch.testing.assert_close((found * texts).sum(dim=1), scores[:, 0])


def test_aligned_vectors_pass_gradients_to_what_was_read():
    tokens = torch.eye(3)[None].clone().requires_grad_()
    read = aligned_vectors(tokens, torch.tensor([[0.1, 1.0, 0.0]]))
    (read * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert tokens.grad[0, 1].any()
    assert not tokens.grad[0, [0, 2]].any()
    with pytest.raises(ValueError, match=r"expected `texts` of shape \(batch, dim\)"):
        aligned_vectors(tokens, torch.ones(2, 3))
