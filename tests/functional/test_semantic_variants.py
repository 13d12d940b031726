import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads import SemanticVariantHead
from czsl_heads.functional import choose_variants, primitive_scores


def draw(batch=3, attributes=4, objects=3, pairs=6, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(count, (pairs,), generator=generator) for count in (attributes, objects)]
    scores = torch.randn(batch, pairs, generator=generator, dtype=torch.float64)
    return scores, torch.stack(words, dim=1), attributes, objects


def loop(scores, pairs, attributes, objects):
    found = [torch.full((len(scores), count), -torch.inf, dtype=scores.dtype) for count in (attributes, objects)]
    for row in range(len(scores)):
        for column, words in enumerate(pairs.tolist()):
            for kind, word in enumerate(words):
                found[kind][row, word] = max(found[kind][row, word], scores[row, column])
    return tuple(found)


@given(
    sizes=st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 13)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_loop(sizes, seed):
    inputs = draw(*sizes, seed=seed)
    for found, expected in zip(primitive_scores(*inputs), loop(*inputs)):
        assert torch.equal(found, expected)


def test_gradients_reach_the_best_pair_alone():
    scores, pairs, attributes, objects = draw()
    scores.requires_grad_()

    def of_words(values):
        found = torch.cat(primitive_scores(values, pairs, attributes, objects), dim=1)
        return found[:, found.isfinite().all(dim=0)]

    assert torch.autograd.gradcheck(of_words, scores)
    equal = torch.zeros(1, 3, requires_grad=True)
    best, _ = primitive_scores(equal, torch.tensor([[0, 0], [0, 1], [0, 2]]), 1, 3)
    best.sum().backward()
    assert equal.grad.tolist() == [[1.0, 0.0, 0.0]]  # of equals the first


def test_the_order_of_pairs_is_nothing():
    scores, pairs, attributes, objects = draw()
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    shuffled = primitive_scores(scores[:, order], pairs[order], attributes, objects)
    for found, expected in zip(shuffled, primitive_scores(scores, pairs, attributes, objects)):
        assert torch.equal(found, expected)


def test_nan_is_not_hidden():
    scores, pairs, attributes, objects = draw()
    scores[1, 2] = torch.nan
    of_attributes, of_objects = primitive_scores(scores, pairs, attributes, objects)
    attribute, obj = pairs[2].tolist()
    assert of_attributes[1, attribute].isnan()
    assert of_objects[1, obj].isnan()
    assert not of_attributes[0].isnan().any()


def test_wrong_pairs_are_told():
    scores, pairs, attributes, objects = draw()
    with pytest.raises(ValueError, match=r"expected `pairs` to be in \[0, 2\], got 7"):
        primitive_scores(scores, pairs.clone().fill_(7), 8, objects)
    with pytest.raises(ValueError, match=r"expected `pairs` of shape \(pairs, 2\) with batch=3, pairs=6"):
        primitive_scores(scores, pairs[:5], attributes, objects)


@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)),
    alpha=st.sampled_from([0.0, 0.5, 2.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_variants_are_chosen_as_by_a_loop(sizes, alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    batch, count, dim = sizes
    variants = torch.randn(batch, count, dim, generator=generator, dtype=torch.float64)
    texts, image = (torch.randn(batch, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    chosen, index = choose_variants(variants, texts, image, alpha=alpha)
    for row in range(batch):
        affinity = [float(v @ texts[row] + alpha * (v @ image[row])) for v in variants[row]]
        assert affinity[index[row]] == pytest.approx(max(affinity))
        assert torch.equal(chosen[row], variants[row, index[row]])


def test_gradients_go_through_the_chosen_variant_alone():
    variants = torch.eye(3, dtype=torch.float64)[None].repeat(2, 1, 1).requires_grad_()
    texts = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64).requires_grad_()
    chosen, index = choose_variants(variants, texts, texts, alpha=0.5)
    assert index.tolist() == [1, 0]  # of equals the first
    chosen.sum().backward()
    assert texts.grad is None
    assert variants.grad.sum(dim=2).tolist() == [[0.0, 3.0, 0.0], [3.0, 0.0, 0.0]]


def test_the_head_is_the_function_times_its_scales():
    scores, pairs, attributes, objects = draw()
    head = SemanticVariantHead(init_scale=10.0, alpha=0.3)
    probabilities = scores.softmax(dim=1).float()
    found = head(probabilities, pairs, attributes, objects)
    for logits, expected in zip(found, primitive_scores(probabilities, pairs, attributes, objects)):
        torch.testing.assert_close(logits, 10 * expected)
    variants, texts = torch.randn(3, 2, 5), torch.randn(3, 5)
    expected = choose_variants(variants, texts, texts, alpha=0.3)[0]
    assert torch.equal(head.choose(variants, texts, texts), expected)
    assert set(dict(head.named_parameters())) == {"log_scale_attributes", "log_scale_objects"}


def test_words_without_a_pair_leave_the_gradient_of_the_scales_finite():
    head, pairs = SemanticVariantHead(), torch.tensor([[0, 0], [0, 1]])
    probabilities = torch.tensor([[0.3, 0.7], [0.8, 0.2]], requires_grad=True)
    attributes, objects = head(probabilities, pairs, 3, 2)
    assert (attributes[:, 1:] == -torch.inf).all()
    targets = torch.tensor([0, 0])
    loss = F.cross_entropy(attributes, targets) + F.cross_entropy(objects, targets)
    loss.backward()
    assert head.log_scale_attributes.grad == 0  # of a single attribute nothing is to be learned
    assert head.log_scale_objects.grad.isfinite()
    assert probabilities.grad.isfinite().all()
