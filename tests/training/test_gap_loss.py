"""The loss that closes the gap, in a stage: of the whole batch, whatever the processes, and of the vectors compared."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from czsl_heads import SparseAlignHead
from czsl_heads.data import CompositionDataset
from czsl_heads.functional import cua_loss, cuaxu_loss
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.recipe import build as build_recipe
from czsl_heads.training.gap_loss import add_gap_loss
from czsl_heads.training.options import Options
from czsl_heads.training.stage import Stage
from tests.models.shared import METHODS, PAIRS, build, make_images

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("kind", "loss"), [("cua", cua_loss), ("cuaxu", cuaxu_loss)])
def test_it_is_of_the_texts_of_the_batch(kind, loss):
    generator = torch.Generator().manual_seed(0)
    vectors, texts = torch.randn(6, 5, generator=generator), torch.randn(9, 5, generator=generator)
    targets = torch.tensor([7, 2, 7, 4, 2, 2])
    known = {"loss_pairs": torch.tensor(1.0), "loss": torch.tensor(2.0)}
    found = add_gap_loss(known, vectors, texts, targets, kind=kind, weight=0.3)
    expected = loss(vectors, texts[[2, 4, 7]], labels=torch.tensor([2, 0, 2, 1, 0, 0]), temperature=None)
    torch.testing.assert_close(found["loss_gap"], expected)
    torch.testing.assert_close(found["loss"], 2.0 + 0.3 * expected)
    assert found["loss_pairs"] == 1
    assert known.keys() == {"loss_pairs", "loss"}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_compares(name):
    images, texts = make_images(), torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    for align in ("cls", SparseAlignHead(), SparseAlignHead("mean"), SparseAlignHead("linear", dim=96)):
        model = build(name, align=align)
        with torch.no_grad():
            encoded = model.encode(images)
            logits = model.compare(encoded, model.texts(PAIRS))[0]
            found = model.vectors(encoded, logits, texts)
            expected = encoded[:, 0] if align == "cls" else align.vectors(encoded, texts)
        assert found.shape == (6, 96)
        torch.testing.assert_close(torch.cosine_similarity(found, expected), torch.ones(6))


def aligned(dataset, options):
    torch.manual_seed(0)
    return build_recipe(options.recipe("sac", "tiny", "max"), dataset.space)


def test_a_stage_adds_it_and_a_condenser_gives_its_own_vectors(dataset: CompositionDataset, options: Options) -> None:
    images = torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    batch = [images, torch.as_tensor(dataset.images("train").columns[:5])]
    for model in (aligned(dataset, options), Condensed(aligned(dataset, options))):
        chosen = dataclasses.replace(options, gap_loss="cuaxu", gap_weight=2.0)
        with_gap, without = (Stage(model, dataset, each, seed=0).eval() for each in (chosen, options))
        with torch.no_grad():
            texts = model.texts(with_gap.train_space.pairs)
            found, expected = with_gap._losses(batch, texts), without._losses(batch, texts)
        assert found.keys() == expected.keys() | {"loss_gap"}
        torch.testing.assert_close(found["loss"], expected["loss"] + 2 * found["loss_gap"])


def test_it_is_refused_in_parts_of_a_batch() -> None:
    with pytest.raises(ValueError, match="expected `micro_batch` to be None with gap_loss='cua'"):
        Options(gap_loss="cua", micro_batch=8)
    with pytest.raises(ValueError, match="expected `gap_loss` to be one of cua, cuaxu, got 'cu'"):
        Options(gap_loss="cu")
    with pytest.raises(ValueError, match="expected `gap_weight` to be at least 0, got -1"):
        Options(gap_weight=-1)
    assert Options(gap_loss="cua", micro_batch=64).gap_weight == 0.1


SCRIPT = """
import json
import sys

import torch
import torch.distributed as dist

from czsl_heads.training.gap_loss import add_gap_loss

rank, world = int(sys.argv[1]), 2
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=world)
torch.manual_seed(0)
images, texts = torch.randn(8, 5), torch.randn(4, 3)
targets = torch.tensor([0, 3, 3, 1, 0, 0, 2, 3])
of_images, of_texts = torch.nn.Linear(5, 3), torch.nn.Linear(3, 3)
parameters = [*of_images.parameters(), *of_texts.parameters()]


def gradients(rows):
    known = {"loss": torch.zeros(())}
    vectors, moved = of_images(images[rows]), of_texts(texts)
    loss = add_gap_loss(known, vectors, moved, targets[rows], kind="cuaxu", weight=1.0)["loss"]
    return loss.item(), torch.autograd.grad(loss, parameters)


loss, found = gradients(slice(4 * rank, 4 * rank + 4))
for gradient in found:
    dist.all_reduce(gradient)  # and the mean of them, as data-parallel training takes it
dist.destroy_process_group()
alone, expected = gradients(slice(None))
print(json.dumps([loss, alone, [(each / world).tolist() for each in found], [each.tolist() for each in expected]]))
"""


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    started = []
    for rank in range(2):
        command = [sys.executable, "script.py", str(rank), str(tmp_path / "store")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
    for process in started:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-2000:]
        loss, alone, gradients, expected = json.loads(out)
        assert loss == pytest.approx(alone, rel=1e-5)
        for one, other in zip(gradients, expected):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-6)
