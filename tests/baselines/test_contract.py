"""What every method does, on the embedded CLIP: another is tested by its entry point."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from czsl_heads import SparseAlignHead, metrics, wrap
from czsl_heads.adapters.lora import add_lora
from czsl_heads.models.method import Logits
from czsl_heads.models.registry import find_method, presets_path
from czsl_heads.prompts.soft import TextFeatures
from tests.models.shared import (
    ATTRIBUTES,
    BASELINES,
    LEARNING,
    METHODS,
    PAIRS,
    RELEASED,
    SEEN,
    TARGETS,
    THREE_BRANCHES,
    build,
    disturb,
    learned,
    make_images,
    make_space,
    ranked,
    said,
)


@pytest.fixture(scope="module")
def images():
    return make_images()


def parts(logits):
    """All the logits of a method, as a tuple."""
    return (logits,) if isinstance(logits, torch.Tensor) else tuple(logits)


def compared(model, images, pairs, *vectors):
    """Logits in their usual form, of images and of each vector."""
    return model.compare(model.encode(images), model.texts(pairs), *vectors)


def test_every_file_of_a_baseline_has_an_entry_point_and_presets():
    folder = Path(__file__).parents[2] / "baselines"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__", "official"}
    assert set(BASELINES) == files
    for name in BASELINES:
        assert find_method(name).__module__ == f"baselines.{name}"
        assert presets_path(name).is_file()


@pytest.mark.parametrize("name", LEARNING)
def test_the_loss_of_a_fixed_batch_falls(name, images):
    model = build(name).train()
    optimizer = torch.optim.Adam(learned(model), lr=0.01)
    with torch.no_grad():
        before = model.eval().loss(images, SEEN, TARGETS)
    model.train()
    for _ in range(8):
        optimizer.zero_grad()
        model.loss(images, SEEN, TARGETS).backward()
        optimizer.step()
    with torch.no_grad():
        assert model.eval().loss(images, SEEN, TARGETS) < before - 0.05


@pytest.mark.parametrize("name", LEARNING)
def test_a_step_reaches_all_that_is_learned_and_leaves_the_rest(name, images):
    model = disturb(build(name)).train()
    frozen = {key: value.clone() for key, value in model.named_parameters() if not value.requires_grad}
    model.loss(images, SEEN, TARGETS).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in learned(model))
    torch.optim.SGD(learned(model), lr=0.1).step()
    assert all(torch.equal(value, frozen[key]) for key, value in model.named_parameters() if key in frozen)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(LEARNING)))
def test_what_has_no_epochs_learns_nothing(name, images):
    model = build(name)
    assert not learned(model)
    assert model.loss(images, SEEN, TARGETS).isfinite()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("align", ["cls", "max"])
def test_saved_and_loaded_it_gives_the_same_scores(name, align, images, tmp_path):
    head = "cls" if align == "cls" else SparseAlignHead()
    model = disturb(build(name, align=head))
    if learned(model):
        model.train().loss(images, PAIRS, TARGETS).backward()  # batch norm, too, has something to save
        model.eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = build(name, align=head)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(other.scores(images, PAIRS), model.scores(images, PAIRS))
        if name in LEARNING:
            assert not torch.equal(model.scores(images, PAIRS), build(name, align=head).scores(images, PAIRS))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("align", ["cls", "max"])
@pytest.mark.parametrize("training", [False, True])
def test_no_images_are_a_batch_too(name, align, training, images):
    head = "cls" if align == "cls" else SparseAlignHead()
    model = build(name, align=head).train(training)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    some, none = model(images, PAIRS), model(images[:0], PAIRS)
    for full, empty in zip(parts(some), parts(none)):
        assert (empty.shape, empty.dtype) == ((0, *full.shape[1:]), full.dtype)
    assert model.scores(images[:0], PAIRS).shape == (0, len(PAIRS))
    assert model.loss(images[:0], PAIRS, TARGETS[:0]).isnan()  # the mean of nothing
    if not training:
        assert model.predict(images[:0]) == model.predict([]) == []
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wrong", [-100, -1, 3])
def test_targets_that_are_no_pairs_are_told(name, wrong, images):
    model = build(name)
    targets = TARGETS.clone()
    targets[2] = wrong  # -100 would be left out of one loss, and be another pair in the others
    logits = model.compare(model.encode(images), model.texts(SEEN))[0]
    assert len(SEEN) == 3
    for losses in (model.losses, model.validation_losses):
        with pytest.raises(ValueError, match=r"expected `targets` of shape \(batch\) with batch=6"):
            losses(logits, SEEN, targets[:5])
        with pytest.raises(TypeError, match=r"expected `targets` of dtype torch.int64, got torch.int32"):
            losses(logits, SEEN, TARGETS.int())
        with pytest.raises(ValueError, match=rf"expected `targets` to be in \[0, 2\], got {wrong}"):
            losses(logits, SEEN, targets)


@pytest.mark.parametrize("name", METHODS)
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
    assert metric.result().unbiased.match == pytest.approx(right / len(images))


@pytest.mark.parametrize("name", METHODS)
def test_a_pair_has_the_same_logit_in_both_worlds(name, images):
    model, world = disturb(build(name)), make_space().open_world()
    with torch.no_grad():
        (closed,), (opened,) = compared(model, images, PAIRS), compared(model, images, world.pairs)
    torch.testing.assert_close(closed.pairs, opened.pairs[:, world.index(PAIRS)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_pairs_may_come_in_any_order_and_twice(name, images):
    model, order = disturb(build(name)), [2, 0, 0, 3]
    with torch.no_grad():
        (logits,), (others,) = compared(model, images, PAIRS), compared(model, images, PAIRS[order])
        torch.testing.assert_close(others.pairs, logits.pairs[:, order], atol=1e-4, rtol=0)
        assert model.scores(images, PAIRS[order]).shape == (6, 4)


@pytest.mark.parametrize("name", METHODS)
def test_texts_encoded_before_give_the_same(name, images):
    model = build(name)
    with torch.no_grad():
        assert torch.equal(model.scores(images, PAIRS, model.texts(PAIRS)), model.scores(images, PAIRS))
        loss = model.loss(images, PAIRS, TARGETS, model.texts(PAIRS))
        assert torch.equal(loss, model.loss(images, PAIRS, TARGETS))


@pytest.mark.parametrize("name", METHODS)
def test_texts_are_unit_rows_of_each_kind_that_there_is(name):
    texts = build(name).texts(PAIRS)
    assert isinstance(texts, TextFeatures)
    assert [len(rows) for rows in texts] == [4, 3, 2] if name in THREE_BRANCHES else [4, 0, 0]
    for rows in texts:
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


@pytest.mark.parametrize("name", METHODS)
def test_a_call_gives_the_logits_of_each_branch_that_there_is(name, images):
    model = build(name)
    with torch.no_grad():
        called, (logits,) = model(images, PAIRS), compared(model, images, PAIRS)
    assert type(logits) is Logits
    if name in THREE_BRANCHES:
        assert type(called) is Logits
        assert [rows.shape for rows in called] == [(6, 4), (6, 3), (6, 2)]
        assert (called.attrs is called.attributes, called.objs is called.objects) == (True, True)
    else:
        assert type(called) is torch.Tensor
        assert [rows.shape for rows in logits] == [(6, 4), (6, 0), (6, 0)]
    for one, other in zip(parts(called), logits):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", METHODS)
def test_vectors_are_classified_as_they_are_compared_beside_the_tokens(name, images):
    model = disturb(build(name, align=SparseAlignHead()))
    vectors = torch.randn(2, 6, 96, generator=torch.Generator().manual_seed(2)).unbind()
    with torch.no_grad():
        encoded, texts = model.encode(images), model.texts(PAIRS)
        of_images, *beside = model.compare(encoded, texts, *vectors)
        alone = model.classify(encoded, texts, *vectors)
        assert len(alone) == len(beside) == 2
        for one, other in zip(alone, beside):
            assert all(torch.equal(*rows) for rows in zip(one, other))
        assert all(torch.equal(*rows) for rows in zip(of_images, model.compare(encoded, texts)[0]))
        assert not torch.equal(beside[0].pairs, beside[1].pairs)
        assert model.classify(encoded, texts) == []


@pytest.mark.parametrize("name", METHODS)
def test_the_class_token_as_a_vector_is_the_image(name, images):
    model = disturb(build(name, align="cls"))
    with torch.no_grad():
        encoded = model.encode(images)
        of_images, of_vector = model.compare(encoded, model.texts(PAIRS), encoded[:, 0])
    for rows, others in zip(of_images, of_vector):
        torch.testing.assert_close(rows, others, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_cross_entropies_and_what_is_minimised(name, images):
    model = disturb(build(name))
    with torch.no_grad():
        (logits,) = compared(model, images, SEEN)
        losses = model.losses(logits, SEEN, TARGETS)
        assert torch.equal(losses["loss"], model.loss(images, SEEN, TARGETS))
        validation = model.validation_losses(logits, SEEN, TARGETS)
        assert torch.equal(validation["loss"], model.validation_loss(images, SEEN, TARGETS))
    wanted = dict(zip(("loss_pairs", "loss_attrs", "loss_objs"), (TARGETS, *SEEN[TARGETS].unbind(dim=1))))
    branches = len(wanted) if name in THREE_BRANCHES else 1
    assert list(losses) == list(validation) == [*list(wanted)[:branches], "loss"]
    terms = [F.cross_entropy(rows, row) for rows, row in zip(said(model, logits, SEEN)[:branches], wanted.values())]
    for term, found in zip(terms, losses.values()):
        torch.testing.assert_close(found, term)
    torch.testing.assert_close(losses["loss"], sum(terms))  # weights of 1 in the presets of shapes
    torch.testing.assert_close(validation["loss"], losses["loss"])


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_fused_logits_and_probabilities_are_equation_13(name, images):
    model = disturb(build(name))
    with torch.no_grad():
        (logits,) = compared(model, images, PAIRS)
        scores, probabilities = model.fuse(logits, PAIRS), model.probabilities(logits, PAIRS)
        assert torch.equal(scores, model.scores(images, PAIRS))
    expected = logits.pairs.softmax(dim=1)
    if name in THREE_BRANCHES:
        of_attributes, of_objects = (rows.softmax(dim=1) for rows in said(model, logits, PAIRS)[1:])
        for column, (attribute, obj) in enumerate(PAIRS.tolist()):
            of_words = of_attributes[:, attribute], of_objects[:, obj]
            expected[:, column] = ranked(name, expected[:, column], *of_words)
    torch.testing.assert_close(probabilities, expected)
    assert torch.equal(scores, probabilities if name in THREE_BRANCHES else logits.pairs)


@pytest.mark.parametrize("name", METHODS)
def test_each_part_says_its_own_of_every_pair(name, images):
    model = disturb(build(name))
    with torch.no_grad():
        (logits,) = compared(model, images, PAIRS)
        found = model.parts(logits, PAIRS)
    if name not in THREE_BRANCHES:
        assert found == {}
        return
    assert list(found) == ["pair", "attribute", "object"]
    torch.testing.assert_close(ranked(name, *found.values()), model.probabilities(logits, PAIRS))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("head", [SparseAlignHead(), SparseAlignHead("topk", k=3)], ids=["max", "topk"])
def test_sparse_alignment_adds_no_parameter_and_changes_the_logits(name, head, images):
    published, sparse = build(name, align="cls"), build(name, align=head)
    assert published.state_dict().keys() == sparse.state_dict().keys()
    with torch.no_grad():
        scores = [model.scores(images, PAIRS) for model in (published, sparse)]
    assert not torch.allclose(*scores)


@pytest.mark.parametrize("name", METHODS)
def test_a_head_that_sees_the_class_token_alone_is_the_published_comparison(name, images):
    published, same = build(name, align="cls"), build(name, align=SparseAlignHead("cls"))
    with torch.no_grad():
        torch.testing.assert_close(*(model.scores(images, PAIRS) for model in (published, same)))


@pytest.mark.parametrize("name", METHODS)
def test_unless_it_is_told_otherwise_it_compares_as_published(name, images):
    published = SparseAlignHead() if name == "sac" else "cls"
    with torch.no_grad():
        scores = [model.scores(images, PAIRS) for model in (build(name), build(name, align=published))]
    assert torch.equal(*scores)


@pytest.mark.parametrize("name", METHODS)
def test_the_scale_of_logits_is_the_methods_own(name, images):
    first, second = (build(name, align=SparseAlignHead(logit_scale=scale)) for scale in (1.0, 37.0))
    with torch.no_grad():
        torch.testing.assert_close(*(model.scores(images, PAIRS) for model in (first, second)))


@pytest.mark.parametrize("name", METHODS)
def test_it_runs_under_bfloat16_autocast(name, images):
    model = disturb(build(name, align=SparseAlignHead()))
    with torch.no_grad():
        wide = model(images, SEEN)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(images, SEEN)
        loss = model.train().loss(images, SEEN, TARGETS)
    for one, other in zip(parts(wide), parts(narrow)):
        assert other.dtype == torch.float32
        assert (one - other).abs().max() < 0.05 * model.encoder.logit_scale
    if learned(model):
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in learned(model))


@pytest.mark.parametrize("name", RELEASED)
def test_the_official_switch_is_taken_everywhere(name, images):
    assert build(name, official=True).scores(images, PAIRS).shape == (6, 4)


@pytest.mark.parametrize("name", LEARNING)
def test_checkpoints_change_no_gradient_and_run_the_vision_tower_again(name, images):
    runs, results = [], []
    for checkpoint in (False, True):
        model = build(name, checkpoint=checkpoint)
        if name != "troika":  # which brings adapters of its own
            add_lora(model.encoder, rank=2)
        disturb(model)
        blocks = model.encoder.blocks("vision")
        runs.append(0)
        blocks[0].register_forward_pre_hook(lambda *_: runs.append(runs.pop() + 1))
        loss = model.loss(images, SEEN, TARGETS)
        results.append((loss, torch.autograd.grad(loss, learned(model))))
    (plain, expected), (again, got) = results
    torch.testing.assert_close(again, plain)
    for gradient, other in zip(expected, got):
        torch.testing.assert_close(other, gradient, atol=1e-5 * gradient.abs().max().item() + 1e-9, rtol=1e-4)
    assert runs == [1, 2]


@pytest.mark.parametrize("name", METHODS)
def test_an_encoder_that_knows_no_checkpoints_will_do_where_none_are_asked_for(name, images):
    model = build(name)
    tokens = model.encoder.encode_tokens(images)
    model.encoder.encode_tokens = lambda images: tokens
    assert model.encode(images) is tokens


@pytest.mark.parametrize("name", METHODS)
def test_bad_arguments_are_named(name, images):
    model = build(name)
    with pytest.raises(TypeError, match=r"`pairs` of dtype torch\.int64, got torch\.float32"):
        model(images, PAIRS.float())
    with pytest.raises(ValueError, match=r"`pairs` of shape \(pairs, 2\)"):
        model(images, PAIRS[:, :1])
    with pytest.raises(ValueError, match="`pairs` with at least one row"):
        model(images, PAIRS[:0])
    for wrong in ([[0, 2]], [[-1, 0]]):
        with pytest.raises(ValueError, match=r"`pairs` of indices below \(3, 2\), got"):
            model(images, torch.tensor(wrong))
    for loss in (model.loss, model.validation_loss):
        with pytest.raises(ValueError, match=r"`targets` to be in \[0, 3\], got"):
            loss(images, PAIRS, TARGETS + 3)
        with pytest.raises(ValueError, match=r"`targets` of shape \(6\)"):
            loss(images, PAIRS, TARGETS[:5])
        with pytest.raises(TypeError, match=r"`targets` of dtype torch\.int64"):
            loss(images, PAIRS, TARGETS.float())
    with pytest.raises(ValueError, match="`align` to be one of cls, got 'max'"):
        build(name, align="max")
    with pytest.raises(TypeError, match="`align` to be a SparseAlignHead, got Linear"):
        build(name, align=torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="`space` to be a CompositionSpace"):
        find_method(name)(wrap("tiny"), ATTRIBUTES)
    with pytest.raises(ValueError, match=r"`texts` of shape"):
        model.scores(images, PAIRS[:3], model.texts(PAIRS))
    with pytest.raises(TypeError, match="`texts` to be a"):
        model.scores(images, PAIRS, "texts")
    with pytest.raises(TypeError, match="`context` to be a"):
        build(name, context=None)
    with pytest.raises(TypeError, match="`encoder` to be an Encoder"):
        find_method(name)(torch.nn.Linear(2, 2), make_space())


@pytest.mark.parametrize(
    ("name", "switch"), [*((name, "official") for name in RELEASED), *((name, "checkpoint") for name in LEARNING)]
)
def test_switches_are_true_or_false(name, switch):
    with pytest.raises(TypeError, match=f"`{switch}` to be a bool, got str"):
        build(name, **{switch: "no"})


@pytest.mark.parametrize("name", METHODS)
def test_a_constructor_that_fails_leaves_the_encoder_as_it_was(name):
    encoder = wrap("tiny")
    before = list(encoder.state_dict())
    with pytest.raises(ValueError, match="align"):
        find_method(name)(encoder, make_space(), align="max")
    assert list(encoder.state_dict()) == before


@pytest.mark.parametrize("module", [*BASELINES, "official"])
def test_every_example_runs(module):
    found = importlib.import_module(f"baselines.{module}")
    torch.manual_seed(0)
    assert doctest.testmod(found).failed == 0


def test_the_import_wants_no_gpu_no_window_and_no_trainer():
    imports = ", ".join(f"baselines.{name}" for name in BASELINES)
    script = f"import sys, {imports}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"tkinter", "turtle", "cv2", "triton", "lightning", "clip", "scipy"}
