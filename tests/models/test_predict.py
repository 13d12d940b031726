"""Names for images: `predict` of every method against a slow reference, and all it takes for images."""

from itertools import chain

import pytest
import torch
from PIL import Image

from czsl_heads import SparseAlignHead
from czsl_heads.data import DataError
from czsl_heads.data.images import as_rgb
from czsl_heads.models import method
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Prediction, name_best
from czsl_heads.models.recipe import BankOptions, new_bank
from tests.models.shared import METHODS, PAIRS, THREE_BRANCHES, build, disturb, make_images, make_space, ranked


@pytest.fixture(scope="module")
def images():
    return make_images()


@pytest.fixture(scope="module")
def csp():
    return disturb(build("csp")).eval()


@pytest.fixture(scope="module")
def pictures():
    """Of several sizes, one of them in grey and one with a transparent part."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for mode, (width, height) in zip(("RGB", "L", "RGBA"), ((60, 50), (48, 48), (40, 90))):
        channels = len(mode)
        values = torch.randint(256, (height, width, channels), dtype=torch.uint8, generator=generator)
        made.append(Image.fromarray(values.squeeze(2).numpy() if channels == 1 else values.numpy()))
    assert [picture.mode for picture in made] == ["RGB", "L", "RGBA"]
    return made


def condensed(name, images, bank=True):
    torch.manual_seed(1)
    model = Condensed(disturb(build(name, align=SparseAlignHead())), beta=0.3, gamma=0.6).eval()
    if bank:
        model.bank = new_bank(model.space, model.encoder, BankOptions(slots=2))
        with torch.no_grad():
            model.adapt(model(images, PAIRS))
    return model


def reference(model, image, pairs):
    """Names and scores of one image, best first."""
    scores = model.scores(image[None], pairs)[0].tolist()
    named = []
    for (attribute, obj), score in zip(pairs.tolist(), scores):
        named.append((model.space.attributes[attribute], model.space.objects[obj], score))
    return sorted(named, key=lambda each: -each[2])


def assert_like_reference(model, images, found, pairs, topk):
    assert len(found) == len(images)
    for image, predictions in zip(images, found):
        expected = reference(model, image, pairs)[:topk]
        assert [each[:2] for each in predictions] == [each[:2] for each in expected]
        for each, (_, _, score) in zip(predictions, expected):
            assert type(each) is Prediction
            assert type(each.score) is float
            assert each.score == pytest.approx(score, rel=1e-4, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("topk", [1, 3, 4, 100])
def test_names_come_by_their_score(name, topk, images):
    model = disturb(build(name)).eval()
    assert_like_reference(model, images, model.predict(images, topk), PAIRS, topk)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bank", [True, False])
def test_names_of_a_condensed_model_come_by_fused_scores(name, bank, images):
    model = condensed(name, images, bank)
    found = model.predict(images, 4)
    assert_like_reference(model, images, found, PAIRS, 4)
    for prediction in chain(*found):
        assert list(prediction.parts) == ["alignment", "condenser", "bank"][: 2 + bank]
        alignment, condenser, memory = [*prediction.parts.values(), 0.0][:3]
        assert prediction.score == pytest.approx(0.3 * alignment + 0.7 * (condenser + 0.6 * memory), rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_parts_are_those_of_the_pair(name, images):
    model = disturb(build(name)).eval()
    for prediction in chain(*model.predict(images, 4)):
        if name not in THREE_BRANCHES:
            assert prediction.parts == {}
            continue
        assert list(prediction.parts) == ["pair", "attribute", "object"]
        assert prediction.score == pytest.approx(ranked(name, *prediction.parts.values()), rel=1e-5)


def test_five_pairs_are_named_unless_told_otherwise(csp, images):
    world = make_space().open_world().pairs
    assert [len(predictions) for predictions in csp.predict(images, pairs=world)] == [5] * len(images)
    assert len(csp.predict(images)[0]) == 4  # there are no more


@torch.no_grad()
def test_candidates_may_be_other_pairs(csp, images):
    for pairs in (make_space().open_world().pairs, PAIRS[[2, 0]], torch.tensor([[1, 1]])):
        assert_like_reference(csp, images, csp.predict(images, 3, pairs=pairs), pairs, 3)


def test_a_bank_answers_for_its_own_pairs_only(images):
    model = condensed("csp", images)
    with pytest.raises(ValueError, match="expected `pairs` to be the 4 pairs of the bank, got 2"):
        model.predict(images, pairs=PAIRS[:2])


@pytest.mark.parametrize("name", METHODS)
def test_texts_known_before_give_the_same_and_are_not_encoded_again(name, images, monkeypatch):
    model = disturb(build(name)).eval()
    world = make_space().open_world().pairs
    expected = model.predict(images), model.predict(images, pairs=world)
    known = model.texts(PAIRS), model.texts(world)

    def refuse(pairs):
        raise AssertionError("texts were encoded")

    monkeypatch.setattr(model, "texts", refuse)
    assert model.predict(images, texts=known[0]) == expected[0]
    assert model.predict(images, pairs=world, texts=known[1]) == expected[1]


def test_texts_of_other_pairs_are_refused(csp, images):
    with pytest.raises(ValueError, match=r"`texts` of shape"):
        csp.predict(images, texts=csp.texts(PAIRS[:3]))
    with pytest.raises(TypeError, match="`texts` to be a TextFeatures"):
        csp.predict(images, texts=csp.texts(PAIRS).pairs)


def test_tensors_pictures_paths_and_lists_agree(csp, pictures, tmp_path, monkeypatch):
    transform = csp.encoder.transform()
    batch = torch.stack([transform(as_rgb(picture)) for picture in pictures])
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(tmp_path / f"{number}.png")
        picture.save(paths[-1])
    expected = csp.predict(batch)
    assert csp.predict(pictures) == expected
    assert csp.predict(paths) == csp.predict(tuple(map(str, paths))) == expected
    assert csp.predict([paths[0], pictures[1], str(paths[2])]) == expected
    for place in range(3):
        alone = csp.predict(batch[place : place + 1])
        for image in (pictures[place], paths[place], str(paths[place])):
            assert csp.predict(image) == alone
        names = [[each[:2] for each in predictions] for predictions in (alone[0], expected[place])]
        assert names[0] == names[1]


def test_images_are_read_and_run_a_few_at_a_time(csp, images, pictures, monkeypatch):
    expected = [[each[:2] for each in predictions] for predictions in csp.predict(images)]
    sizes = []
    encode = csp.encode
    monkeypatch.setattr(csp, "encode", lambda batch: sizes.append(len(batch)) or encode(batch))
    monkeypatch.setattr(method, "_IMAGES", 2)
    assert [[each[:2] for each in predictions] for predictions in csp.predict(images)] == expected
    assert len(csp.predict(pictures)) == 3
    assert sizes == [2, 2, 2, 2, 1]
    assert csp.predict([]) == []


def test_predicting_keeps_no_graph_and_writes_no_bank(images):
    model = condensed("sac", images)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.enable_grad():
        model.predict(images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_in_training_is_refused(images, wrapped):
    model = condensed("csp", images) if wrapped else build("csp")
    with pytest.raises(
        ValueError, match=r"expected a model in eval mode, got one in training mode: call model\.eval\(\)"
    ):
        model.train().predict(images)
    assert model.eval().predict(images)


def test_arguments_that_cannot_be_right_are_named(csp, images, tmp_path):
    with pytest.raises(ValueError, match="expected `topk` to be at least 1, got 0"):
        csp.predict(images, 0)
    with pytest.raises(TypeError, match=r"expected `topk` to be an integer, got 2\.0"):
        csp.predict(images, 2.0)
    with pytest.raises(ValueError, match=r"expected `images` of shape \(batch, 3, height, width\), got \(3, 48, 48\)"):
        csp.predict(images[0])
    for wrong in (3, None, iter([]), {"a": 1}):
        with pytest.raises(TypeError, match="expected `images` to be a tensor, a PIL image, a path or a list, got"):
            csp.predict(wrong)
    with pytest.raises(TypeError, match="expected `images` to list PIL images and paths, got a Tensor"):
        csp.predict([images[0], images[1]])
    with pytest.raises(TypeError, match=r"`pairs` of dtype torch\.int64"):
        csp.predict(images, pairs=PAIRS.float())
    with pytest.raises(DataError, match=r"none\.png: expected an image file, got none"):
        csp.predict(tmp_path / "none.png")
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(DataError, match=r"words\.png: expected an image, got a file of another kind"):
        csp.predict(str(tmp_path / "words.png"))


def test_the_best_are_named_with_their_own_parts():
    scores = torch.tensor([[0.25, 0.75, 0.5], [3.0, 1.0, 2.0]])
    parts = {"first": scores + 1, "second": -scores}
    names = ("red", "dark"), ("star",)
    found = name_best(scores, parts, torch.tensor([[0, 0], [1, 0], [0, 0]]), names, 2)
    assert found[0] == [
        Prediction("dark", "star", 0.75, {"first": 1.75, "second": -0.75}),
        Prediction("red", "star", 0.5, {"first": 1.5, "second": -0.5}),
    ]
    assert [each.score for each in found[1]] == [3.0, 2.0]
    assert name_best(scores[:0], {}, torch.tensor([[0, 0]] * 3), names, 2) == []


def test_of_equal_scores_the_first_pair_wins():
    scores = torch.zeros(1, 144)
    scores[0, [5, 70, 100]] = 1.0
    pairs = torch.cartesian_prod(torch.arange(12), torch.arange(12))
    words = [str(number) for number in range(12)]
    named = name_best(scores, {}, pairs, (words, words), 4)[0]
    found = [12 * int(prediction.attribute) + int(prediction.object) for prediction in named]
    assert found == [5, 70, 100, 0]
    assert found[0] == int(scores.argmax())
