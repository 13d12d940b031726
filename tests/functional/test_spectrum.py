import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from czsl_heads.functional.spectrum import effective_rank, explained_variance
from tests.functional.test_gap import draw


@given(sizes=st.tuples(st.integers(2, 13), st.integers(1, 9)), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_equal_the_eigenvalues_of_the_covariance(sizes, seed):
    vectors = draw(images=sizes[0], dim=sizes[1], seed=seed)[0]
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    values = torch.linalg.eigvalsh(torch.cov(unit.T).reshape(sizes[1], sizes[1])).flip(0).clamp(min=0)
    if values.sum() < 1e-12:
        assert not explained_variance(vectors).any()
        return
    shares = (values / values.sum())[: min(sizes)]
    assert torch.allclose(explained_variance(vectors), shares, atol=1e-9)
    roots = shares.sqrt() / shares.sqrt().sum()
    entropy = -sum(root * math.log(root) for root in roots.tolist() if root > 1e-6)
    assert effective_rank(vectors).item() == pytest.approx(math.exp(entropy), rel=1e-3)


def test_hand_sized_values():
    everywhere = torch.cat([torch.eye(5), -torch.eye(5)])
    assert torch.allclose(explained_variance(everywhere), torch.full((5,), 0.2, dtype=torch.float64))
    assert effective_rank(everywhere).item() == pytest.approx(5)
    assert effective_rank(torch.eye(2)).item() == pytest.approx(1)
    same = torch.ones(4, 3) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert effective_rank(same).item() == 0
    assert not explained_variance(same).any()


def test_a_turn_changes_nothing():
    vectors = draw(images=30, dim=5)[0]
    turn = torch.linalg.qr(draw(images=5, dim=5, seed=2)[0]).Q
    assert torch.allclose(explained_variance(vectors @ turn), explained_variance(vectors))
    assert torch.isclose(effective_rank(vectors @ turn), effective_rank(vectors))


def test_wrong_input_is_told():
    vectors = draw()[0]
    with pytest.raises(ValueError, match=r"expected `vectors.shape\[0\]` to be at least 2, got 1"):
        effective_rank(vectors[:1])
    with pytest.raises(ValueError, match="expected `vectors` without zero vectors, got one in row 2"):
        explained_variance(vectors.index_fill(0, torch.tensor([2]), 0))
    vectors[1, 1] = torch.nan
    assert explained_variance(vectors).isnan().all()
    assert effective_rank(vectors).isnan()
