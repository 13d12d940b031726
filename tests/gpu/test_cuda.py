"""On a CUDA GPU everything is what it is on the CPU, to rounding. ``make gpu`` runs these; CI does not."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from czsl_heads import DynamicMemoryBank, SparseAlignHead, wrap
from czsl_heads.data import read_dataset
from czsl_heads.functional import maxsim
from czsl_heads.functional.fusion import fuse
from czsl_heads.metrics import CZSLScore
from czsl_heads.models.condensed import Condensed
from czsl_heads.training.ablate import run_ablation
from czsl_heads.training.finished import evaluate
from czsl_heads.training.loaders import eval_loader
from tests.models.shared import LEARNING, METHODS, PAIRS, SEEN, TARGETS, build, disturb, make_images, make_space

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
LOOSE = {"rtol": 1e-3, "atol": 1e-4}  # products in another order, through a whole tower


@pytest.fixture(autouse=True)
def _whole_float32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scores_and_gradients(tokens, texts, **options):
    inputs = [part.clone().requires_grad_() for part in (tokens, texts)]
    scores = maxsim(*inputs, **options)
    scores.square().sum().backward()
    return [part.cpu() for part in (scores.detach(), *(each.grad for each in inputs))]


@pytest.mark.parametrize("backend", ["auto", "stream", "dense", "triton"])
@pytest.mark.parametrize("sizes", [(2, 7, 3, 5), (3, 257, 130, 67), (2, 50, 70, 768), (0, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_maxsim(backend, sizes, own):
    batch, length, count, dim = sizes
    tokens = torch.randn(batch, length, dim, generator=seeded())
    texts = torch.randn((batch, count, dim) if own else (count, dim), generator=seeded(1))
    expected = scores_and_gradients(tokens, texts, backend="dense")
    found = scores_and_gradients(tokens.to(GPU), texts.to(GPU), backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["stream", "dense", "triton"])
def test_maxsim_of_halves_finds_the_best_token(dtype, backend):
    tokens, texts = torch.randn(3, 90, 64, generator=seeded()), torch.randn(40, 64, generator=seeded(1))
    tokens, texts = tokens.to(dtype), texts.to(dtype)
    exact = torch.einsum("bld,cd->blc", tokens.double(), texts.double()).amax(dim=1)
    found = maxsim(tokens.to(GPU), texts.to(GPU), backend=backend).cpu()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=0.1)


def test_maxsim_of_several_tokens_and_of_a_bfloat16_selection():
    tokens, texts = torch.randn(3, 90, 64, generator=seeded()), torch.randn(40, 64, generator=seeded(1))
    for options in ({"k": 3}, {"select": "bf16"}):
        expected = maxsim(tokens, texts, **options)
        torch.testing.assert_close(maxsim(tokens.to(GPU), texts.to(GPU), **options).cpu(), expected, **LOOSE)


def test_all_products_are_never_held_together():
    tokens, texts = torch.randn(64, 257, 256, device=GPU), torch.randn(8000, 256, device=GPU)
    held = 64 * 257 * 8000 * 4
    for backend in ("stream", "triton"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        maxsim(tokens, texts, backend=backend)
        assert torch.cuda.max_memory_allocated() - before < held / 2


@pytest.mark.parametrize("reduce", ["max", "topk", "logsumexp", "mean", "linear", "attention"])
def test_heads(reduce):
    torch.manual_seed(0)
    options = {"topk": {"k": 3}, "linear": {"dim": 64}, "attention": {"dim": 64}}
    head = SparseAlignHead(reduce, **options.get(reduce, {}))
    tokens, texts = torch.randn(3, 9, 64, generator=seeded()), torch.randn(5, 64, generator=seeded(1))
    expected = head(tokens, texts)
    found = copy.deepcopy(head).to(GPU)(tokens.to(GPU), texts.to(GPU))
    torch.testing.assert_close(found.cpu(), expected, **LOOSE)


@pytest.mark.parametrize("empty", ["mask", "zero"])
def test_a_memory_bank_reads_and_learns(empty):
    banks = [DynamicMemoryBank(7, 16, slots=3, empty=empty).to(device) for device in ("cpu", GPU)]
    texts, rows = F.normalize(torch.randn(4, 16, generator=seeded()), dim=1), torch.tensor([0, 2, 5, 6])
    for turn in range(4):
        features = torch.randn(11, 16, generator=seeded(turn))
        probs = (2 * torch.randn(11, 7, generator=seeded(turn + 9))).softmax(dim=1)
        for bank in banks:
            place = bank(features[:0].to(bank_device(bank))).device
            bank.update(features.to(place), probs.to(place))
            if turn == 1:
                bank.fill_texts(texts.to(place), rows.to(place))
        expected, found = (bank(features.to(bank_device(bank))).cpu() for bank in banks)
        torch.testing.assert_close(found, expected, **LOOSE)


def bank_device(bank):
    return next(iter(bank.buffers())).device


@pytest.mark.parametrize("protocol", ["exact", "standard"])
def test_the_evaluator(protocol):
    space = make_space()
    scores = torch.rand(40, len(space), generator=seeded())
    targets = torch.randint(len(space), (40,), generator=seeded(1))
    results = []
    for device in ("cpu", GPU):
        score = CZSLScore(space, protocol=protocol).to(device)
        for part, target in zip(scores.split(7), targets.split(7)):
            score.update(part.to(device), target.to(device))
        results.append(score.result())
    for name in ("auc", "harmonic_mean", "seen", "unseen", "attr_accuracy", "obj_accuracy"):
        assert getattr(results[0], name) == getattr(results[1], name)


def test_fused_scores():
    parts = [torch.rand(5, 9, generator=seeded(seed)).softmax(dim=1) for seed in range(3)]
    expected = fuse(*parts, beta=0.4, gamma=0.2)
    torch.testing.assert_close(fuse(*(part.to(GPU) for part in parts), beta=0.4, gamma=0.2).cpu(), expected)


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name):
    model = disturb(build(name))
    found = []
    for device in ("cpu", GPU):
        moved, pairs = copy.deepcopy(model).to(device), PAIRS.to(device)
        with torch.no_grad():
            logits = moved(make_images().to(device), pairs)
            found.append([part.cpu() for part in tree_leaves(logits)])
    torch.testing.assert_close(found[1], found[0], **LOOSE)


def gradients(model, device):
    moved = copy.deepcopy(model).to(device)
    loss = moved.loss(make_images().to(device), SEEN.to(device), (TARGETS % len(SEEN)).to(device))
    learned = [parameter for parameter in moved.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, learned, allow_unused=True)
    return [loss.detach().cpu(), *(each.cpu() for each in found if each is not None)]


@pytest.mark.parametrize("name", LEARNING)
def test_gradients_of_every_method_that_learns(name):
    model = disturb(build(name))
    torch.testing.assert_close(gradients(model, GPU), gradients(model, "cpu"), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", LEARNING)
def test_a_step_does_not_wait_for_the_gpu(name):
    model = disturb(build(name)).to(GPU)
    images, pairs, targets = make_images().to(GPU), SEEN.to(GPU), (TARGETS % len(SEEN)).to(GPU)
    model.loss(images, pairs, targets).backward()  # what is made once, is made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.loss(images, pairs, targets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_whole_of_sac():
    method = disturb(build("sac", align=SparseAlignHead("max")))
    model = Condensed(method, bank=DynamicMemoryBank(len(PAIRS), method.encoder.dim, slots=3))
    found = []
    for device in ("cpu", GPU):
        moved, pairs = copy.deepcopy(model).to(device).eval(), PAIRS.to(device)
        with torch.no_grad():
            logits = moved(make_images().to(device), pairs)
            found.append(moved.fuse(logits, pairs).cpu())
            moved.adapt(logits)
    torch.testing.assert_close(found[1], found[0], **LOOSE)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_and_evaluation(configured, tmp_path: Path, precision: str):
    flags = {"accelerator": "gpu", "precision": precision, "enable_progress_bar": False}
    run_ablation(tmp_path / "run", configured(trainer=flags))
    quiet = {"enable_progress_bar": False}
    of_gpu = evaluate(tmp_path / "run", trainer={**quiet, "accelerator": "gpu"})
    of_cpu = evaluate(tmp_path / "run", trainer={**quiet, "accelerator": "cpu"})
    for one, other in zip(of_gpu["rows"], of_cpu["rows"]):
        numbers = [row["by_seed"][0]["test"]["closed"]["exact"] for row in (one, other)]
        for name in ("auc", "harmonic_mean", "attr_accuracy"):
            assert numbers[0][name] == pytest.approx(numbers[1][name], abs=2e-2)


def test_images_of_a_packed_file_are_copied_from_pinned_memory(shapes_root: Path, tmp_path: Path):
    dataset = replace(read_dataset(shapes_root), cache_dir=tmp_path)
    images, columns = next(iter(eval_loader(dataset.images("val", wrap("tiny").transform()), 4, workers=1)))
    assert images.is_pinned()
    assert columns.is_pinned()
