"""The condenser and the memory bank behind the seam of every baseline."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from baselines import BASELINES
from baselines.condensed import Condensed
from czsl_heads import DynamicMemoryBank, SparseAlignHead, VACondenser, metrics
from czsl_heads.functional import distillation
from tests.baselines.test_contract import TARGETS, build, disturb, learned, make_space, parts

PAIRS = make_space().pairs
SEEN = PAIRS[make_space().seen_mask]


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def condensed(name, align="max", bank=True, official=False, **options):
    """Of a method that is not as it was made."""
    method = disturb(build(name, align="cls" if align == "cls" else SparseAlignHead(align), official=official))
    memory = DynamicMemoryBank(len(PAIRS), method.encoder.dim, slots=3) if bank else None
    return Condensed(method, bank=memory, **options).eval()


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("align", ["cls", "max"])
def test_the_vector_takes_the_place_of_the_class_token(name, align, images):
    model = condensed(name, align)
    method = model.method
    with torch.no_grad():
        out = model(images, PAIRS)
        for one, other in zip(parts(out.aligned), parts(method(images, PAIRS))):
            torch.testing.assert_close(one, other)
        tokens, texts = method.encode(images), method.texts(PAIRS)
        torch.testing.assert_close(out.features, model.condenser(tokens))
        if name == "troika":
            expected = []
            views = (lambda vector: vector, method.attribute_disentangler, method.object_disentangler)
            for rows, view in zip(texts, views):
                drawn = method.traction(rows, method.traction.read(method.traction.token_norm(tokens)), len(images))
                length = tokens[:, 0].norm(dim=-1)[:, None, None]  # what the disentanglers are used to
                vector = F.normalize(view(length * out.features[:, None]), dim=-1)
                expected.append(method.encoder.logit_scale * (vector * drawn).sum(dim=-1))
        else:
            expected = [method.encoder.logit_scale * out.features @ texts.T]
    for one, other in zip(parts(out.condensed), expected):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_scores_are_equation_12(name, images):
    model = condensed(name, beta=0.3, gamma=0.6)
    with torch.no_grad():
        model.adapt(model(images[:4], PAIRS))
        out = model(images, PAIRS)
        logits = [parts(which) for which in (out.aligned, out.condensed)]
        both = [pairs.softmax(dim=1) for pairs, *_ in logits]
        if name == "troika":
            both = [
                probs + attrs.softmax(dim=1)[:, PAIRS[:, 0]] * objs.softmax(dim=1)[:, PAIRS[:, 1]]
                for probs, (_, attrs, objs) in zip(both, logits)
            ]
        expected = 0.3 * both[0] + 0.7 * (both[1] + 0.6 * model.bank(out.features).softmax(dim=1))
        torch.testing.assert_close(model.scores(images, PAIRS), expected)
        model.bank = None
        torch.testing.assert_close(model.scores(images, PAIRS), 0.3 * both[0] + 0.7 * both[1])


def test_the_official_troika_adds_probabilities_too(images):
    model = condensed("troika", bank=False, official=True)
    with torch.no_grad():
        out = model(images, PAIRS)
        halves = [model.method.probabilities(part, PAIRS) for part in (out.aligned, out.condensed)]
        torch.testing.assert_close(model.scores(images, PAIRS), sum(halves) / 2)
        assert halves[0].max() <= 2  # where its own scores hold a logit
        assert model.method.fuse(out.aligned, PAIRS).max() > 2


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_loss_is_of_labels_and_of_the_methods_own_logits(name, alpha, images):
    model = condensed(name, alpha=alpha, direction="forward").train()
    out = model(images, SEEN)
    by_labels = model.method.loss_of(out.condensed, SEEN, TARGETS)
    taught = distillation(parts(out.condensed)[0], parts(out.aligned)[0], direction="forward")
    torch.testing.assert_close(model.loss(images, SEEN, TARGETS), (1 - alpha) * by_labels + alpha * taught)


@pytest.mark.parametrize("name", BASELINES)
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


@pytest.mark.parametrize("name", BASELINES)
def test_only_adapting_writes(name, images):
    model = condensed(name)
    with torch.no_grad():
        out = model(images, PAIRS)
        assert int(model.bank.counts.sum()) == 0
        model.adapt(out)
        rows = parts(out.condensed)[0].argmax(dim=1)
    assert torch.equal(model.bank.counts, rows.bincount(minlength=len(PAIRS)).clamp(max=3))


@pytest.mark.parametrize("name", BASELINES)
def test_saved_and_loaded_it_gives_the_same_scores(name, images, tmp_path):
    model, other = condensed(name), condensed(name)
    with torch.no_grad():
        model.adapt(model(images, PAIRS))
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        assert not torch.equal(model.scores(images, PAIRS), other.scores(images, PAIRS))
        other.load_state_dict(load_file(tmp_path / "model.safetensors"))
        torch.testing.assert_close(model.scores(images, PAIRS), other.scores(images, PAIRS))  # a loaded bank is sorted


def test_it_is_evaluated_in_the_open_world_without_a_bank(images):
    space, model = make_space().open_world(), condensed("csp", bank=False)
    score = metrics.CZSLScore(space)
    with torch.no_grad():
        score.update(model.scores(images, space.pairs), TARGETS)
    assert 0 <= score.compute().auc <= 1


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
    assert all(parameter.requires_grad for parameter in [csp.prompts.primitives])  # nothing was frozen yet
    model = condensed("csp")
    with torch.no_grad(), pytest.raises(ValueError, match="`pairs` to be the 4 pairs of the bank, got 2"):
        model.scores(images, PAIRS[:2])
    with pytest.raises(ValueError, match="`bank` to be a memory bank, got None"):
        condensed("csp", bank=False).adapt(model(images, PAIRS))
