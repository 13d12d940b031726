"""SAC under the paper's words and `Condensed` behind `Aligned`, which the commands train, are one arithmetic."""

import pytest
import torch

from czsl_heads import SAC, CompositionSpace, DynamicMemoryBank, SparseAlignHead, VACondenser, wrap
from czsl_heads.adapters.lora import add_lora
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.sac import Aligned

SPACE = CompositionSpace(["red", "striped", "dark"], ["circle", "star"], seen=[(0, 0), (1, 1), (2, 0)], unseen=[(0, 1)])
SEEN = SPACE.subset(SPACE.seen_mask)
TARGETS = torch.tensor([0, 1, 2, 2, 1, 0])
WEIGHTS = {"alpha": 0.4, "beta": 0.3, "gamma": 0.6, "direction": "forward"}


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def adapted():
    """A CLIP whose adapters are not as they were made, so that they have an effect."""
    torch.manual_seed(1)
    encoder = wrap("tiny")
    for attention in add_lora(encoder, rank=2):
        for delta in attention.deltas.values():
            torch.nn.init.normal_(delta.b, std=0.1)
    return encoder


def parts(dropout=0.0):
    """Encoder, head, condenser and bank, alike at each call."""
    encoder = adapted()
    head = SparseAlignHead("topk", k=3, cls_weight=0.2, logit_scale=1.0)
    condenser = VACondenser(encoder.dim, depth=2, dropout=dropout)
    return encoder, head, condenser, DynamicMemoryBank(len(SPACE), encoder.dim, slots=2)


def both(joint=False, dropout=0.0):
    """The same model in the paper's words and as the engine has it, with prompts that are not as they were made."""
    encoder, head, condenser, bank = parts(dropout)
    sac = SAC(encoder, SPACE, head=head, condenser=condenser, bank=bank, prompt_dropout=dropout, **WEIGHTS)
    encoder, head, condenser, bank = parts(dropout)
    aligned = Aligned(encoder, SPACE, align=head, dropout=dropout)
    for prompts in (sac.prompts, aligned.prompts):
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in prompts.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return sac.eval(), Condensed(aligned, condenser, bank=bank, joint=joint, **WEIGHTS).eval()


def gradients(model):
    """By the names that the parts have in SAC."""
    named = {name.removeprefix("method."): parameter for name, parameter in model.named_parameters()}
    return {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


def assert_same_gradients(sac, engine, least):
    found, expected = gradients(engine), gradients(sac)
    assert found.keys() == expected.keys()
    assert len(found) >= least
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * gradient.abs().max().item())


def test_they_hold_the_same_tensors():
    sac, engine = both()
    state = {name.removeprefix("method."): tensor for name, tensor in engine.state_dict().items()}
    expected = {name.replace("head.", "seam.head."): tensor for name, tensor in sac.state_dict().items()}
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


@torch.no_grad()
def test_logits_bank_and_scores_are_equal(images):
    sac, engine = both()
    texts, known = sac.texts(SPACE), engine.texts(SPACE.pairs)
    for part in images.split(4):
        out, logits = sac(part, texts), engine(part, SPACE.pairs, known)
        sac.adapt(out)
        engine.adapt(logits)
    assert int(sac.bank.counts.sum()) > 1

    out, logits = sac(images, texts), engine(images, SPACE.pairs, known)
    for one, other in zip((*out.sa, *out.vac), (*logits.aligned, *logits.condensed)):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.features, out.features, rtol=0, atol=1e-6)
    for name, tensor in sac.bank.state_dict().items():
        torch.testing.assert_close(engine.bank.state_dict()[name], tensor, rtol=0, atol=1e-6)
    torch.testing.assert_close(engine.bank(logits.features), out.bank, rtol=0, atol=1e-4)
    torch.testing.assert_close(engine.fuse(logits, SPACE.pairs), out.scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(engine.scores(images, SPACE.pairs), out.scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(engine.parts(logits, SPACE.pairs)["bank"], out.bank.softmax(1), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["probs", "logits"])
def test_stage_one_alone_ranks_alike(images, fusion):
    sac = SAC(adapted(), SPACE, condenser=False, fusion=fusion)
    aligned = Aligned(adapted(), SPACE, fusion=fusion)
    torch.testing.assert_close(aligned.scores(images, SPACE.pairs), sac(images, sac.texts(SPACE)).scores)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_stage_one_trains_alike(images, dropout):
    sac, engine = both(joint=True, dropout=dropout)
    aligned = engine.method
    found = []
    for run in (
        lambda: sac.train().losses(sac(images, sac.texts(SEEN)), TARGETS)["loss"],
        lambda: aligned.train().loss(images, SEEN.pairs, TARGETS),
    ):
        torch.manual_seed(3)  # of dropout, which both draw for the prompts first
        found.append(run())
        found[-1].backward()
    torch.testing.assert_close(*found)
    condenser = {f"condenser.{name}" for name, _ in sac.condenser.named_parameters()}
    assert not gradients(sac).keys() & condenser
    assert_same_gradients(sac, engine, least=4 + 2 * 3 * 4)  # prompts; two matrices for q, k and v of four blocks


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_stage_two_trains_alike(images, dropout):
    sac, engine = both(dropout=dropout)
    sac.requires_grad_(False).condenser.requires_grad_(True).train()
    engine.train()
    torch.manual_seed(3)
    losses = sac.losses(sac(images, sac.texts(SEEN)), TARGETS, stage="condense")
    losses["loss"].backward()
    torch.manual_seed(3)
    found = engine.losses(engine(images, SEEN.pairs), SEEN.pairs, TARGETS)
    found["loss"].backward()
    assert (
        found.keys()
        == losses.keys()
        == {
            "loss_vac_pairs",
            "loss_vac_attrs",
            "loss_vac_objs",
            "loss_distill",
            "loss",
        }
    )
    for name, loss in losses.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-6, atol=1e-6)
    assert_same_gradients(sac, engine, least=20)


def test_both_stages_at_once_train_alike(images):
    sac, engine = both(joint=True)
    losses = sac.losses(sac(images, sac.texts(SEEN)), TARGETS, stage="joint")
    losses["loss"].backward()
    found = engine.losses(engine(images, SEEN.pairs), SEEN.pairs, TARGETS)
    found["loss"].backward()
    assert found.keys() == losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-6, atol=1e-6)
    assert_same_gradients(sac, engine, least=48)
