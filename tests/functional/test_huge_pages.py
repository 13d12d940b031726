import ctypes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from czsl_heads.functional import huge_pages
from czsl_heads.functional.huge_pages import empty_in_huge_pages


@given(shape=st.lists(st.integers(0, 40), max_size=3), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_it_is_an_ordinary_tensor(shape, dtype):
    tensor = empty_in_huge_pages(tuple(shape), dtype)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == (torch.Size(shape), dtype, "cpu")
    assert tensor.is_contiguous()
    assert not tensor.fill_(3).ne(3).any()


def test_whole_pages_within_the_tensor_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(huge_pages, "_advise", lambda: lambda *given: asked.append(given))
    tensor = empty_in_huge_pages((3 * 2**20,), torch.float32)  # 12 MB
    ((start, length, wish),) = asked
    assert wish == 14
    assert start.value % 2**21 == length.value % 2**21 == 0
    assert tensor.data_ptr() <= start.value < tensor.data_ptr() + 2**21
    assert tensor.data_ptr() + tensor.nbytes - 2**21 < start.value + length.value <= tensor.data_ptr() + tensor.nbytes


@pytest.mark.parametrize("count", [0, 1, 400_000])
def test_nothing_is_asked_for_a_tensor_without_a_whole_page(monkeypatch, count):
    monkeypatch.setattr(huge_pages, "_advise", lambda: pytest.fail)
    assert len(empty_in_huge_pages((count,), torch.float32)) == count


def test_other_systems_have_none(monkeypatch):
    huge_pages._advise.cache_clear()
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("nothing is to be loaded"))
    try:
        assert huge_pages._advise() is None
        assert len(empty_in_huge_pages((2**21,), torch.float32)) == 2**21
    finally:
        huge_pages._advise.cache_clear()
