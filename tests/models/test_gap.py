"""The gap of whole models on a data set: which vectors stand for images, by loops."""

import pytest
import torch
import torch.nn.functional as F

from czsl_heads import SparseAlignHead, wrap
from czsl_heads.data import read_dataset
from czsl_heads.metrics import gap_report
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.gap import MEANINGS, gap_reports, winning_tokens
from czsl_heads.models.recipe import Recipe, build


@pytest.fixture(scope="module")
def dataset(shapes_root):
    return read_dataset(shapes_root)


@pytest.fixture(scope="module")
def images(dataset):
    opened = dataset.images("test", wrap("tiny").transform())
    return torch.stack([opened[number][0] for number in range(len(opened))])


def make(dataset, align="cls"):
    return build(Recipe("clip", "tiny", align), dataset.space).eval()


def test_winning_tokens_are_the_nearest():
    generator = torch.Generator().manual_seed(0)
    tokens, texts = torch.randn(4, 6, 5, generator=generator), torch.randn(4, 5, generator=generator)
    for include_cls in (True, False):
        vectors, index = winning_tokens(tokens, texts, include_cls=include_cls)
        for row in range(4):
            products = tokens[row] @ texts[row]
            first = 0 if include_cls else 1
            assert index[row] == first + products[first:].argmax()
            assert torch.equal(vectors[row], tokens[row, index[row]])


@torch.no_grad()
@pytest.mark.parametrize("align", ["cls", "max", "topk"])
def test_every_vector_is_what_its_name_says(dataset, images, align):
    model = make(dataset, align)
    reports = gap_reports(model, dataset, batch_size=20)
    tokens = F.normalize(model.encoder.encode_tokens(images), dim=2)
    texts = model.texts(dataset.space.pairs)
    columns = torch.tensor([sample.column for sample in dataset.samples["test"]])
    scores = model.scores(images, dataset.space.pairs, texts)
    predicted = scores.masked_fill(~dataset.eval_mask("test"), -torch.inf).argmax(dim=1)
    expected = {
        "cls": tokens[:, 0],
        "pred": winning_tokens(tokens, texts.pairs[predicted])[0],
        "true": winning_tokens(tokens, texts.pairs[columns])[0],
    }
    if align == "topk":
        head = SparseAlignHead("topk", k=4)
        expected["read"] = head.vectors(tokens, texts.pairs[predicted])
    assert reports.keys() == expected.keys()
    assert reports.keys() <= MEANINGS.keys()
    for name, vectors in expected.items():
        numbers = gap_report(vectors, texts.pairs, columns).numbers
        assert reports[name].numbers == pytest.approx(numbers, rel=1e-3, abs=1e-3)


def test_a_condenser_has_a_vector_of_its_own(dataset, images):
    torch.manual_seed(0)
    model = Condensed(make(dataset, "max")).eval()
    reports = gap_reports(model, dataset)
    assert list(reports) == ["cls", "pred", "true", "vac"]
    with torch.no_grad():
        features = model.condenser(model.encoder.encode_tokens(images))
    columns = torch.tensor([sample.column for sample in dataset.samples["test"]])
    numbers = gap_report(features, model.texts(dataset.space.pairs).pairs, columns).numbers
    assert reports["vac"].numbers == pytest.approx(numbers, rel=1e-3, abs=1e-3)


def test_some_images_may_stand_for_all(dataset):
    model = make(dataset)
    some = gap_reports(model, dataset, limit=10, seed=3)
    assert len(some["cls"].labels) == 10
    assert gap_reports(model, dataset, limit=10, seed=3)["cls"].numbers == some["cls"].numbers
    assert len(gap_reports(model, dataset, split="val")["cls"].labels) == len(dataset.samples["val"])


def test_what_cannot_be_measured_is_told(dataset):
    model = make(dataset)
    with pytest.raises(ValueError, match="expected a model in eval mode"):
        gap_reports(model.train(), dataset)
    with pytest.raises(ValueError, match="expected `limit` to be at least 2, got 1"):
        gap_reports(model.eval(), dataset, limit=1)
    with pytest.raises(ValueError, match="expected `model` of the pairs of `dataset`, got one of others"):
        gap_reports(build(Recipe("clip"), dataset.space.subset(dataset.space.pairs[:9])).eval(), dataset)
