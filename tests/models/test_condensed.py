"""The condenser and the memory bank behind the seam of every method."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from czsl_heads import DynamicMemoryBank, SparseAlignHead, VACondenser, metrics
from czsl_heads.functional import distillation
from czsl_heads.models.condensed import Condensed, CondensedLogits
from tests.models.shared import (
    METHODS,
    PAIRS,
    SEEN,
    TARGETS,
    THREE_BRANCHES,
    blank,
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


def condensed(name, align="max", bank=True, official=False, joint=False, **options):
    """Of a method that is not as it was made."""
    quirks = {"official": True} if official else {}
    method = disturb(build(name, align="cls" if align == "cls" else SparseAlignHead(align), **quirks))
    memory = DynamicMemoryBank(len(PAIRS), method.encoder.dim, slots=3) if bank else None
    return Condensed(method, bank=memory, joint=joint, **options).eval()


def refuse_to_be_read(model):
    """From now on, reading the bank raises; writing does not."""

    def refuse(module, arguments):
        raise AssertionError("the bank was read")

    return model.bank.register_forward_pre_hook(refuse)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("align", ["cls", "max"])
def test_the_vector_takes_the_place_of_the_class_token(name, align, images):
    model = condensed(name, align)
    method = model.method
    with torch.no_grad():
        out = model(images, PAIRS)
        tokens, texts = method.encode(images), method.texts(PAIRS)
        for one, other in zip(out.aligned, method.compare(tokens, texts)[0]):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(out.features, model.condenser(tokens))
        scale = method.encoder.logit_scale
        if name == "troika":
            expected = []
            views = (lambda vector: vector, method.attribute_disentangler, method.object_disentangler)
            for rows, view in zip(texts, views):
                drawn = method.traction(rows, method.traction.read(method.traction.token_norm(tokens)), len(images))
                length = tokens[:, 0].norm(dim=-1)[:, None, None]  # what the disentanglers are used to
                vector = F.normalize(view(length * out.features[:, None]), dim=-1)
                expected.append(scale * (vector * drawn).sum(dim=-1))
        else:
            expected = [scale * out.features @ rows.T for rows in texts]
    assert type(out) is CondensedLogits
    for one, other in zip(out.condensed, expected):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_equation_12(name, images):
    model = condensed(name, beta=0.3, gamma=0.6)
    with torch.no_grad():
        model.adapt(model(images[:4], PAIRS))
        out = model(images, PAIRS)
        both = [logits.pairs.softmax(dim=1) for logits in (out.aligned, out.condensed)]
        if name in THREE_BRANCHES:
            for number, logits in enumerate((out.aligned, out.condensed)):
                attrs, objs = (rows.softmax(dim=1) for rows in said(model.method, logits, PAIRS)[1:])
                both[number] = ranked(name, both[number], attrs[:, PAIRS[:, 0]], objs[:, PAIRS[:, 1]])
        memory = model.bank(out.features).softmax(dim=1)
        expected = 0.3 * both[0] + 0.7 * (both[1] + 0.6 * memory)
        for found in (model.scores(images, PAIRS), model.fuse(out, PAIRS), model.probabilities(out, PAIRS)):
            torch.testing.assert_close(found, expected)
        parts = model.parts(out, PAIRS)
        for part, wanted in zip(parts.values(), (*both, memory)):
            torch.testing.assert_close(part, wanted)
        assert list(parts) == ["alignment", "condenser", "bank"]
        model.bank = None
        torch.testing.assert_close(model.scores(images, PAIRS), 0.3 * both[0] + 0.7 * both[1])
        assert list(model.parts(out, PAIRS)) == ["alignment", "condenser"]


def test_the_official_troika_adds_probabilities_too(images):
    model = condensed("troika", bank=False, official=True)
    with torch.no_grad():
        out = model(images, PAIRS)
        halves = [model.method.probabilities(part, PAIRS) for part in (out.aligned, out.condensed)]
        torch.testing.assert_close(model.scores(images, PAIRS), sum(halves) / 2)
        assert halves[0].max() <= 2  # where its own scores hold a logit
        assert model.method.fuse(out.aligned, PAIRS).max() > 2


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_loss_is_of_labels_and_of_the_methods_own_logits(name, alpha, images):
    model = condensed(name, alpha=alpha, direction="forward").train()
    out = model(images, SEEN)
    by_labels = model.method.losses(out.condensed, SEEN, TARGETS)
    taught = distillation(out.condensed.pairs, out.aligned.pairs, direction="forward")
    losses = model.losses(out, SEEN, TARGETS)
    torch.testing.assert_close(losses["loss"], (1 - alpha) * by_labels.pop("loss") + alpha * taught)
    assert torch.equal(losses["loss"], model.loss(images, SEEN, TARGETS))
    torch.testing.assert_close(losses["loss_distill"], taught)
    for term, value in by_labels.items():
        assert torch.equal(losses[term.replace("loss_", "loss_vac_")], value)
    assert len(losses) == len(by_labels) + 2
    validation = model.validation_losses(out, SEEN, TARGETS)
    assert torch.equal(validation["loss"], model.validation_loss(images, SEEN, TARGETS))


@pytest.mark.parametrize("name", METHODS)
def test_the_condenser_alone_learns_and_the_method_stays_as_it_is(name, images):
    model = condensed(name).train()
    assert not any(module.training for module in model.method.modules())
    assert model.condenser.training
    assert {id(parameter) for parameter in learned(model)} == {
        id(parameter) for parameter in model.condenser.parameters()
    }
    before = {key: value.clone() for key, value in model.method.state_dict().items()}
    optimizer = torch.optim.Adam(learned(model), lr=3e-4)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model.loss(images, SEEN, TARGETS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(value, before[key]) for key, value in model.method.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_what_is_frozen_keeps_no_graph(name, images):
    model = condensed(name).train()
    wanting = images.clone().requires_grad_()
    assert not any(rows.requires_grad for rows in (model.encode(wanting), *model.texts(PAIRS)))
    assert not model(wanting, PAIRS).aligned.pairs.requires_grad


@pytest.mark.parametrize("name", METHODS)
def test_joint_training_is_the_sum_of_both_losses(name, images):
    """Eq. 11: of one batch, nothing drawn at random."""
    model = condensed(name, joint=True, alpha=0.4)
    out = model(images, SEEN)
    losses, own = model.losses(out, SEEN, TARGETS), model.method.losses(out.aligned, SEEN, TARGETS)
    by_labels = model.method.losses(out.condensed, SEEN, TARGETS)["loss"]
    taught = distillation(out.condensed.pairs, out.aligned.pairs)
    torch.testing.assert_close(losses["loss"], own["loss"] + 0.6 * by_labels + 0.4 * taught)
    torch.testing.assert_close(model.loss(images, SEEN, TARGETS), losses["loss"])
    assert all(torch.equal(losses[name], own[name]) for name in own if name != "loss")


@pytest.mark.parametrize("name", METHODS)
def test_joint_training_reaches_the_method_and_the_condenser(name, images):
    model = condensed(name, joint=True).train()
    assert all(module.training for module in (model, model.method, model.condenser, model.method.seam))
    assert not model.eval().method.training
    model.train().loss(images, SEEN, TARGETS).backward()
    for part in (model.method, model.condenser):
        assert all(parameter.grad is not None for parameter in learned(part))
    assert any(parameter.grad.any() for parameter in learned(model.condenser))
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    assert len(learned(model)) == len(learned(build(name))) + len(learned(model.condenser))


@pytest.mark.parametrize("name", METHODS)
def test_the_teacher_is_not_taught(name, images):
    """By distillation alone, no gradient comes to what the method says of the images."""
    model = condensed(name, joint=True, alpha=1.0)
    out = model(images, SEEN)
    aligned = out.aligned._replace(pairs=out.aligned.pairs.detach().requires_grad_())
    model.losses(out._replace(aligned=aligned), SEEN, TARGETS)["loss_distill"].backward()
    assert aligned.pairs.grad is None
    assert any(parameter.grad.any() for parameter in learned(model.condenser))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("joint", [False, True], ids=["behind", "joint"])
def test_the_bank_is_read_for_scores_alone(name, joint, images):
    model = condensed(name, joint=joint)
    with torch.no_grad():
        model.adapt(model(images, PAIRS))
    refuse_to_be_read(model)
    model.train().loss(images, SEEN, TARGETS)  # also over other pairs than those of the bank
    out = model.eval()(images, PAIRS)
    model.losses(out, PAIRS, TARGETS)
    model.validation_losses(out, PAIRS, TARGETS)
    model.validation_loss(images, PAIRS, TARGETS)
    with torch.no_grad():
        model.adapt(out)
        for read in (model.fuse, model.probabilities, model.parts):
            with pytest.raises(AssertionError, match="the bank was read"):
                read(out, PAIRS)
        with pytest.raises(AssertionError, match="the bank was read"):
            model.scores(images, PAIRS)


@pytest.mark.parametrize("name", METHODS)
def test_only_adapting_writes(name, images):
    model = condensed(name)
    with torch.no_grad():
        out = model(images, PAIRS)
        model.scores(images, PAIRS)
        assert int(model.bank.counts.sum()) == 0
        model.adapt(out)
        rows = out.condensed.pairs.argmax(dim=1)
    assert torch.equal(model.bank.counts, rows.bincount(minlength=len(PAIRS)).clamp(max=3))


@pytest.mark.parametrize("name", METHODS)
def test_known_logits_of_the_method_are_taken_as_they_are(name, images):
    model = condensed(name)
    with torch.no_grad():
        tokens, texts = model.encode(images), model.texts(PAIRS)
        (whole,) = model.compare(tokens, texts)
        (again,) = model.compare(tokens, texts, aligned=whole.aligned)
    assert again.aligned is whole.aligned
    for one, other in zip(again.condensed, whole.condensed):
        assert torch.equal(one, other)
    assert torch.equal(again.features, whole.features)


@pytest.mark.parametrize("name", METHODS)
def test_vectors_are_classified_as_they_are_compared_beside_the_tokens(name, images):
    model = condensed(name)
    vectors = torch.randn(2, 6, 96, generator=torch.Generator().manual_seed(2)).unbind()
    with torch.no_grad():
        tokens, texts = model.encode(images), model.texts(PAIRS)
        out, *beside = model.compare(tokens, texts, *vectors)
        for one, other in zip(model.classify(tokens, texts, *vectors), beside):
            assert all(torch.equal(*rows) for rows in zip(one, other))
        (of_features,) = model.classify(tokens, texts, out.features)
    for one, other in zip(out.condensed, of_features):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded_it_gives_the_same_scores(name, images, tmp_path):
    model, other = condensed(name), condensed(name)
    with torch.no_grad():
        model.adapt(model(images, PAIRS))
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        assert not torch.equal(model.scores(images, PAIRS), other.scores(images, PAIRS))
        other.load_state_dict(load_file(tmp_path / "model.safetensors"))
        torch.testing.assert_close(model.scores(images, PAIRS), other.scores(images, PAIRS))  # a loaded bank is sorted


def test_losses_and_scores_ask_a_gpu_for_nothing():
    model, device = condensed("troika", bank=False, joint=True).train(), torch.device("cuda", 0)
    with FakeTensorMode():  # whose tensors have no values, and raise where one is asked for
        blank(model, device)
        images = torch.empty(6, 3, 48, 48, device=device)
        pairs = torch.empty(3, 2, dtype=torch.long, device=device)
        loss = model.loss(images, pairs, torch.empty(6, dtype=torch.long, device=device))
        scores = model.eval().scores(images, pairs)
    assert loss.device == scores.device == device


def test_it_is_a_method_by_itself(images):
    model = condensed("csp")
    assert (model.encoder, model.space, model.seam) == (model.method.encoder, model.method.space, model.method.seam)
    assert not any(name.startswith(("encoder.", "seam.")) for name in model.state_dict())  # the method has them


def test_it_is_evaluated_in_the_open_world_without_a_bank(images):
    space, model = make_space().open_world(), condensed("csp", bank=False)
    score = metrics.CZSLScore(space)
    with torch.no_grad():
        score.update(model.scores(images, space.pairs), TARGETS)
    assert 0 <= score.compute()["auc"] <= 1


def test_texts_are_drawn_to_the_tokens_once_for_both(images):
    model, calls = condensed("troika", bank=False), []
    model.method.disentangle = "each"  # or the winner's text is drawn once more
    model.method.traction.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(images, PAIRS)
    assert len(calls) == 3  # branches


def test_it_runs_under_bfloat16_autocast(images):
    model = condensed("troika", bank=False)
    with torch.autocast("cpu", torch.bfloat16):
        model.train().loss(images, SEEN, TARGETS).backward()
    assert all(parameter.grad.isfinite().all() for parameter in learned(model))


def test_bad_arguments_are_named(images):
    csp = build("csp")
    with pytest.raises(TypeError, match="`method` to be a Method, got Linear"):
        Condensed(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="`condenser` to be a VACondenser"):
        Condensed(csp, torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="`bank` to be a DynamicMemoryBank"):
        Condensed(csp, bank=True)
    with pytest.raises(ValueError, match="`condenser` of the encoder's width 96, got 64"):
        Condensed(csp, VACondenser(64))
    with pytest.raises(ValueError, match="`bank` of the encoder's width 96, got 64"):
        Condensed(csp, bank=DynamicMemoryBank(4, 64))
    for name in ("alpha", "beta"):
        with pytest.raises(ValueError, match=f"`{name}` to be"):
            Condensed(csp, **{name: 1.5})
    with pytest.raises(ValueError, match="`gamma` to be"):
        Condensed(csp, gamma=-1)
    with pytest.raises(ValueError, match="`direction` to be one of reverse, forward"):
        Condensed(csp, direction="both")
    with pytest.raises(TypeError, match="`joint` to be a bool, got str"):
        Condensed(csp, joint="yes")
    assert csp.prompts.primitives.requires_grad  # nothing was frozen yet
    model = condensed("csp")
    with torch.no_grad(), pytest.raises(ValueError, match="`pairs` to be the 4 pairs of the bank, got 2"):
        model.scores(images, PAIRS[:2])
    with pytest.raises(ValueError, match="`bank` to be a memory bank, got None"):
        condensed("csp", bank=False).adapt(model(images, PAIRS))
