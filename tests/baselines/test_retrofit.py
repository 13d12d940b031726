"""The code of docs/retrofit.md, run on stand-ins with the interface of the released modules."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baselines.csp import CSP
from baselines.troika import Troika
from czsl_heads import DynamicMemoryBank, SparseAlignHead, VACondenser
from czsl_heads.functional import distillation
from tests.baselines import reference

PAGE = Path(__file__).parents[2] / "docs" / "retrofit.md"
ATTRIBUTES, OBJECTS = ["sliced", "old", "wet"], ["apple", "dog"]
SIZES = {"vision": 128, "text": 64, "dim": 64, "patch": 5, "grid": 3}
PAIRS = torch.tensor([[2, 1], [0, 0], [1, 1], [0, 1]])


@pytest.fixture
def page():
    """The names of the page's blocks, run in order."""
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 15, 15, generator=torch.Generator().manual_seed(2))


class Blocks(nn.Module):
    """Takes and gives [tokens, batch, width], as OpenAI's."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def forward(self, hidden):
        hidden = hidden.permute(1, 0, 2)
        for layer in range(reference.depth(self.state, "visual.")):
            hidden = reference.block(self.state, f"visual.transformer.resblocks.{layer}", hidden)
        return hidden.permute(1, 0, 2)


class Visual(nn.Module):
    """OpenAI's vision tower: images in, projected [CLS] out."""

    def __init__(self, state):
        super().__init__()
        self.state, self.transformer, self.proj = state, Blocks(state), state["visual.proj"]
        self.ln_post = nn.LayerNorm(len(state["visual.ln_post.weight"]))
        self.ln_post.load_state_dict({name: state[f"visual.ln_post.{name}"] for name in ("weight", "bias")})

    def forward(self, images):
        hidden = reference.embedded_patches(self.state, images).permute(1, 0, 2)
        hidden = self.transformer(hidden).permute(1, 0, 2)
        return self.ln_post(hidden[:, 0]) @ self.proj


class Disentangler(nn.Module):
    """Rows in, rows out; three dimensions raise, as in the released code."""

    def __init__(self, state, name):
        super().__init__()
        width = len(state[f"{name}.fc1.bias"])
        self.fc1, self.bn1_fc = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.load_state_dict({key.removeprefix(f"{name}."): state[key] for key in state if key.startswith(f"{name}.")})
        self.eval()

    def forward(self, rows):
        return F.dropout(self.bn1_fc(self.fc1(rows)).relu(), 0.5, self.training)


def test_tokens_are_those_that_the_tower_itself_projects(page, images):
    state = reference.random_clip(**SIZES)
    visual = Visual(state)
    tokens = page["project_tokens"](visual, images)
    torch.testing.assert_close(tokens, reference.image_tokens(state, images))
    torch.testing.assert_close(tokens[:, 0], visual(images))
    assert not visual.transformer._forward_hooks


@pytest.mark.parametrize("reduce", ["cls", "max"])
def test_the_changed_csp_is_ours(page, images, reduce):
    state, generator = reference.random_clip(**SIZES), torch.Generator().manual_seed(3)
    table = torch.randn(5, SIZES["text"], generator=generator)
    page["align"] = SparseAlignHead(reduce, logit_scale=1.0)
    official = SimpleNamespace(clip_model=SimpleNamespace(logit_scale=state["logit_scale"], visual=Visual(state)))
    context = state["token_embedding.weight"][[reference.A, reference.PHOTO, reference.OF]]
    texts = reference.text_features(state, context, reference.pair_words(table, PAIRS, len(ATTRIBUTES)))
    logits = page["pair_logits"](official, page["project_tokens"](official.clip_model.visual, images), texts)
    ours = CSP.from_official(state, table, ATTRIBUTES, OBJECTS, align=SparseAlignHead(reduce))
    torch.testing.assert_close(logits, ours(images, PAIRS), atol=1e-4, rtol=0)
    published = reference.csp_logits(state, table, len(ATTRIBUTES), images, PAIRS)
    assert torch.allclose(logits, published, atol=1e-4) == (reduce == "cls")


@pytest.mark.parametrize("reduce", ["cls", "max"])
def test_the_changed_troika_is_ours(page, images, reduce):
    state = reference.random_troika(primitives=5, **SIZES)
    page["align"] = SparseAlignHead(reduce, logit_scale=1.0)
    official = SimpleNamespace(
        clip=SimpleNamespace(logit_scale=state["clip.logit_scale"]),
        **{name: Disentangler(state, name) for name in ("attr_disentangler", "obj_disentangler")},
    )
    tokens = reference.image_tokens(state, images, "clip.", "additional_visual_params")
    drawn = reference.drawn_texts(state, len(ATTRIBUTES), tokens, PAIRS)
    compared = page["see"](official, tokens)
    logits = [page["branch_logits"](official, views, texts) for views, texts in zip(compared, drawn)]
    ours = Troika.from_official(state, ATTRIBUTES, OBJECTS, align=SparseAlignHead(reduce), disentangle="each")
    for one, other in zip(logits, ours(images, PAIRS)):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    for one, published in zip(logits, reference.troika_logits(state, len(ATTRIBUTES), images, PAIRS)):
        assert torch.allclose(one, published, atol=1e-4) == (reduce == "cls")
    with pytest.raises(RuntimeError, match="running_mean should contain"):
        official.attr_disentangler(tokens)  # why the page flattens


def test_condenser_and_bank_learn_beside_the_frozen_model(page):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(7, 5, 64, generator=generator, requires_grad=True)
    texts = F.normalize(torch.randn(4, 64, generator=generator), dim=1)
    targets, aligned = torch.tensor([0, 1, 2, 3, 0, 1, 2]), page["align"](tokens, texts) * 100
    condenser, bank = VACondenser(64), DynamicMemoryBank(4, 64)
    logits = 100 * condenser(tokens) @ texts.T
    by_labels, by_teacher = F.cross_entropy(logits, targets), distillation(logits, aligned)
    for alpha in (0.0, 0.3, 1.0):
        loss = page["condenser_loss"](condenser, tokens, texts, targets, aligned, alpha=alpha)
        torch.testing.assert_close(loss, (1 - alpha) * by_labels + alpha * by_teacher)
    page["fill"](bank, condenser, tokens, texts)
    assert torch.equal(bank.counts, logits.argmax(dim=1).bincount(minlength=4))
    scores = page["fused_scores"](bank, condenser, tokens, texts, aligned, beta=0.25, gamma=2.0)
    memory = bank(condenser(tokens)).softmax(dim=1)
    expected = 0.25 * aligned.softmax(dim=1) + 0.75 * (logits.softmax(dim=1) + 2 * memory)
    torch.testing.assert_close(scores, expected)
    assert not scores.requires_grad


def test_tokens_and_texts_of_a_clip_in_float16_will_do(page):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 5, 64, generator=generator).half()
    texts = F.normalize(torch.randn(4, 64, generator=generator), dim=1).half()
    condenser, bank, targets = VACondenser(64), DynamicMemoryBank(4, 64), torch.tensor([0, 1, 2])
    aligned = page["align"](tokens, texts) * 100
    page["condenser_loss"](condenser, tokens, texts, targets, aligned).backward()
    assert all(parameter.grad.isfinite().all() for parameter in condenser.parameters())
    page["fill"](bank, condenser, tokens, texts)
    scores = page["fused_scores"](bank, condenser, tokens, texts, aligned)
    wide = page["fused_scores"](bank, condenser, tokens.float(), texts.float(), aligned.float())
    torch.testing.assert_close(scores.float(), wide, atol=2e-3, rtol=0)
