"""What every baseline of the list does, on the embedded CLIP: another is tested by its line there."""

import doctest
import importlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from baselines import BASELINES
from baselines.options import load_options
from czsl_heads import CompositionSpace, SparseAlignHead, metrics, wrap

ATTRIBUTES, OBJECTS = ["red", "striped", "Dark.Blue"], ["circle", "star"]
LEARNING = [name for name in BASELINES if load_options(name, "shapes")[0].epochs]


def make_space():
    seen, unseen = [(0, 0), (1, 1), (2, 0)], [(0, 1)]
    return CompositionSpace(ATTRIBUTES, OBJECTS, seen=seen, unseen=unseen)


def build(name, **options):
    torch.manual_seed(0)
    small, _ = load_options(name, "shapes")
    return BASELINES[name](wrap("tiny"), make_space(), **{**small.model, **options}).eval()


def disturb(model):
    """Give what is learned other values than its first ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learned(model):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def parts(logits):
    """All the logits of a method, as a tuple."""
    return (logits,) if isinstance(logits, torch.Tensor) else tuple(logits)


def learned(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def seen():
    return make_space().subset(make_space().seen_mask).pairs


TARGETS = torch.tensor([0, 1, 2, 2, 1, 0])


@pytest.mark.parametrize("name", LEARNING)
def test_the_loss_of_a_fixed_batch_falls(name, images, seen):
    model = build(name).train()
    optimizer = torch.optim.Adam(learned(model), lr=0.01)
    with torch.no_grad():
        before = model.eval().loss(images, seen, TARGETS)
    model.train()
    for _ in range(8):
        optimizer.zero_grad()
        model.loss(images, seen, TARGETS).backward()
        optimizer.step()
    with torch.no_grad():
        assert model.eval().loss(images, seen, TARGETS) < before - 0.05


@pytest.mark.parametrize("name", LEARNING)
def test_a_step_reaches_all_that_is_learned_and_leaves_the_rest(name, images, seen):
    model = disturb(build(name)).train()
    frozen = {key: value.clone() for key, value in model.named_parameters() if not value.requires_grad}
    model.loss(images, seen, TARGETS).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in learned(model))
    torch.optim.SGD(learned(model), lr=0.1).step()
    assert all(torch.equal(value, frozen[key]) for key, value in model.named_parameters() if key in frozen)


@pytest.mark.parametrize("name", sorted(BASELINES.keys() - LEARNING))
def test_what_has_no_epochs_learns_nothing(name, images, seen):
    model = build(name)
    assert not learned(model)
    assert model.loss(images, seen, TARGETS).isfinite()


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("align", ["cls", "max"])
def test_saved_and_loaded_it_gives_the_same_scores(name, align, images, tmp_path):
    pairs = make_space().pairs
    head = "cls" if align == "cls" else SparseAlignHead()
    model = disturb(build(name, align=head))
    if learned(model):
        model.train().loss(images, pairs, TARGETS).backward()  # batch norm, too, has something to save
        model.eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = build(name, align=head)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(other.scores(images, pairs), model.scores(images, pairs))
        if name in LEARNING:
            assert not torch.equal(model.scores(images, pairs), build(name, align=head).scores(images, pairs))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("world", ["closed", "open"])
def test_it_is_evaluated_in_both_worlds(name, world, images):
    space = make_space() if world == "closed" else make_space().open_world()
    model = build(name)
    metric, right = metrics.CZSLScore(space), 0
    with torch.no_grad():
        texts = model.texts(space.pairs)
        for part, target in zip(images.split(4), TARGETS.split(4)):
            scores = model.scores(part, space.pairs, texts)
            assert scores.shape == (len(part), len(space))
            assert scores.isfinite().all()
            metric.update(scores, target)
            right += int((scores.argmax(1) == target).sum())
    assert metric.compute().unbiased.match == pytest.approx(right / len(images))


@pytest.mark.parametrize("name", BASELINES)
def test_a_pair_has_the_same_logit_in_both_worlds(name, images):
    space, model = make_space(), disturb(build(name))
    with torch.no_grad():
        closed, opened = (model(images, pairs) for pairs in (space.pairs, space.open_world().pairs))
    closed, opened = map(model.pair_logits, (closed, opened))
    torch.testing.assert_close(closed, opened[:, space.open_world().index(space.pairs)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", BASELINES)
def test_pairs_may_come_in_any_order_and_twice(name, images):
    model = disturb(build(name))
    pairs, order = make_space().pairs, [2, 0, 0, 3]
    with torch.no_grad():
        logits, others = (model.pair_logits(model(images, which)) for which in (pairs, pairs[order]))
        torch.testing.assert_close(others, logits[:, order], atol=1e-4, rtol=0)
        assert model.scores(images, pairs[order]).shape == (6, 4)


@pytest.mark.parametrize("name", BASELINES)
def test_texts_encoded_before_give_the_same(name, images):
    model, pairs = build(name), make_space().pairs
    with torch.no_grad():
        assert torch.equal(model.scores(images, pairs, model.texts(pairs)), model.scores(images, pairs))
        loss = model.loss(images, pairs, TARGETS, model.texts(pairs))
        assert torch.equal(loss, model.loss(images, pairs, TARGETS))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("head", [SparseAlignHead(), SparseAlignHead("topk", k=3)], ids=["max", "topk"])
def test_sparse_alignment_adds_no_parameter_and_changes_the_logits(name, head, images):
    published, sparse = build(name), build(name, align=head)
    assert published.state_dict().keys() == sparse.state_dict().keys()
    with torch.no_grad():
        scores = [model.scores(images, make_space().pairs) for model in (published, sparse)]
    assert not torch.allclose(*scores)


@pytest.mark.parametrize("name", BASELINES)
def test_a_head_that_sees_the_class_token_alone_is_the_published_comparison(name, images):
    published, same = build(name), build(name, align=SparseAlignHead("cls"))
    with torch.no_grad():
        torch.testing.assert_close(*(model.scores(images, make_space().pairs) for model in (published, same)))


@pytest.mark.parametrize("name", BASELINES)
def test_the_scale_of_logits_is_the_methods_own(name, images):
    first, second = (build(name, align=SparseAlignHead(logit_scale=scale)) for scale in (1.0, 37.0))
    with torch.no_grad():
        torch.testing.assert_close(*(model.scores(images, make_space().pairs) for model in (first, second)))


@pytest.mark.parametrize("name", BASELINES)
def test_it_runs_under_bfloat16_autocast(name, images, seen):
    model = disturb(build(name, align=SparseAlignHead()))
    with torch.no_grad():
        wide = model(images, seen)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(images, seen)
        loss = model.train().loss(images, seen, TARGETS)
    for one, other in zip(parts(wide), parts(narrow)):
        assert other.dtype == torch.float32
        assert (one - other).abs().max() < 0.05 * model.encoder.logit_scale
    if learned(model):
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in learned(model))


@pytest.mark.parametrize("name", BASELINES)
def test_the_official_switch_is_taken_everywhere(name, images):
    space = make_space()
    assert build(name, official=True).scores(images, space.pairs).shape == (6, 4)


@pytest.mark.parametrize("name", BASELINES)
def test_bad_arguments_are_named(name, images):
    model, pairs = build(name), make_space().pairs
    with pytest.raises(TypeError, match=r"`pairs` of dtype torch\.int64, got torch\.float32"):
        model(images, pairs.float())
    with pytest.raises(ValueError, match=r"`pairs` of shape \(pairs, 2\)"):
        model(images, pairs[:, :1])
    with pytest.raises(ValueError, match="`pairs` with at least one row"):
        model(images, pairs[:0])
    for wrong in ([[0, 2]], [[-1, 0]]):
        with pytest.raises(ValueError, match=r"`pairs` of indices below \(3, 2\), got"):
            model(images, torch.tensor(wrong))
    with pytest.raises(ValueError, match="`targets` to be rows of the 4 pairs"):
        model.loss(images, pairs, TARGETS + 3)
    with pytest.raises(ValueError, match=r"`targets` of shape \(6\)"):
        model.loss(images, pairs, TARGETS[:5])
    with pytest.raises(TypeError, match=r"`targets` of dtype torch\.int64"):
        model.loss(images, pairs, TARGETS.float())
    with pytest.raises(ValueError, match="`align` to be one of cls, got 'max'"):
        build(name, align="max")
    with pytest.raises(TypeError, match="`align` to be a SparseAlignHead, got Linear"):
        build(name, align=torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="`space` to be a CompositionSpace"):
        BASELINES[name](wrap("tiny"), ATTRIBUTES)
    with pytest.raises(ValueError, match=r"`texts` of shape"):
        model.scores(images, pairs[:3], model.texts(pairs))
    with pytest.raises(TypeError, match="`texts` to be a"):
        model.scores(images, pairs, "texts")
    with pytest.raises(TypeError, match="`official` to be a bool, got str"):
        build(name, official="no")
    with pytest.raises(TypeError, match="`context` to be a"):
        build(name, context=None)
    with pytest.raises(TypeError, match="`encoder` to be an Encoder"):
        BASELINES[name](torch.nn.Linear(2, 2), make_space())


@pytest.mark.parametrize("name", BASELINES)
def test_a_constructor_that_fails_leaves_the_encoder_as_it_was(name):
    encoder = wrap("tiny")
    before = list(encoder.state_dict())
    with pytest.raises(ValueError, match="align"):
        BASELINES[name](encoder, make_space(), align="max")
    assert list(encoder.state_dict()) == before


@pytest.mark.parametrize("module", [*BASELINES, "condensed", "method", "official", "options", "prompts"])
def test_every_example_runs(module):
    found = importlib.import_module(f"baselines.{module}")
    torch.manual_seed(0)
    assert doctest.testmod(found).failed == 0


def test_the_import_wants_no_gpu_no_window_and_no_trainer():
    script = "import sys, baselines; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"tkinter", "turtle", "cv2", "triton", "lightning", "clip", "scipy"}
