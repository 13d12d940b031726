"""Several processes share an evaluation and find what one finds: to the bit, or to rounding if pairs are divided."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from czsl_heads.functional.score_statistics import (
    PairColumns,
    ScoreStatistics,
    merge_statistics,
    partial_statistics,
    score_statistics,
)
from czsl_heads.training.shares import Processes, Shares, ShareSampler, map_tensors, with_tensors

ROOT = Path(__file__).parents[2]
FLAGS = {"accelerator": "cpu", "enable_progress_bar": False}

SCRIPT = """
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

from czsl_heads.data import read_dataset
from czsl_heads.metrics import CZSLScore
from czsl_heads.models.saved import load_model
from czsl_heads.training import trainer
from czsl_heads.training.cache import encode_images
from czsl_heads.training.evaluate import Evaluation
from czsl_heads.training.loaders import eval_loader
from czsl_heads.training.open_world import OpenWorld
from czsl_heads.training.shares import Processes, Shares, map_tensors
from czsl_heads.training.rows import BankPlan, Readout
from czsl_heads.training.stage import Stage
from czsl_heads.training.train import recorded_options

folder, root, count, out = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
plan = BankPlan(3)
readouts = {
    "alone": Readout(),
    "probabilities": Readout(probabilities=True),
    "fused": Readout(0.5),
    "bank": Readout(0.5, 0.5, plan),
    "adapted": Readout(0.4, 0.6, plan._replace(texts=True, updates=True)),
    "images adapted": Readout(0.4, 0.6, plan._replace(updates=True)),
    "one slot": Readout(0.4, 0.6, BankPlan(1)),
}
flags = {"accelerator": "cpu", "enable_progress_bar": False, "devices": count}
if count > 1:
    flags["strategy"] = "ddp"
dataset, options = read_dataset(root), recorded_options(folder)
space = dataset.space
generator = torch.Generator().manual_seed(3)
table = torch.rand(len(space.attributes), len(space.objects), generator=generator)


def evaluated(**choices):
    model = load_model(folder)
    evaluation = Evaluation(model, dataset, options, readouts, open_world=OpenWorld(table), **choices)
    with trainer.quiet():
        trainer.testing_trainer(flags).test(evaluation, verbose=False)
    world = evaluation._worlds["open"]
    return {
        "results": evaluation.as_dicts(),
        "gap": evaluation.gap,
        "rejected": evaluation.rejected,
        "thresholds": evaluation.thresholds.as_dicts(),
        "texts": len(world.texts.pairs),
        "pairs": len(world.space),
        "bank": {name: tensor.tolist() for name, tensor in evaluation.filled_bank("closed", 3).state_dict().items()},
    }


found = {"whole": evaluated(), "divided": evaluated(share_over=0)}

# Stage II: images that are encoded once, and the validation of an epoch.
stage = Stage(load_model(folder).method, dataset, replace(options, selection="loss"), seed=0)
with trainer.quiet():
    validating = trainer.testing_trainer(flags)
    validating.validate(stage, verbose=False)
found["validation"] = {name: value.item() for name, value in validating.callback_metrics.items()}
processes = Processes(validating.global_rank, count)
images = dataset.images("val", stage.model.encoder.transform())
method = stage.model.eval()
with torch.no_grad():
    texts = method.texts(space.pairs)
loader = eval_loader(images, Shares(len(images), options.eval_batch_size, processes))
kept = encode_images(method, loader, texts, device=torch.device("cpu"), limit=None)
sums = []
map_tensors(lambda each: sums.append(each.double().sum().item()), (kept.encoded, kept.logits, kept.columns))
found["encoded"] = sums + [len(kept)]

# What a user does whose processes have columns of their own, in plain torch.
scores = torch.randn(37, len(space), generator=generator)
target = torch.randint(len(space), (37,), generator=generator)
metric = CZSLScore(space, sync_on_compute=False)
first, last = (len(space) * rank // count for rank in (processes.rank, processes.rank + 1))
parts = [metric.partial([(first, scores[:, first:last])], target)]
if count > 1:
    everyone = [None] * count
    distributed.all_gather_object(everyone, parts[0])
    parts = everyone
metric.add(metric.merge(parts))
found["merged"] = metric.result().as_dict()

(out / f"{count}-{processes.rank}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def run(condensed: Path, shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict]]:
    """What each of so many processes found."""
    out = tmp_path_factory.mktemp("shared")
    (out / "script.py").write_text(SCRIPT)
    known: dict[int, list[dict]] = {}

    def run(count: int) -> list[dict]:
        if count not in known:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            command = [*launcher, "script.py", str(condensed), str(shapes_root), str(count), str(out)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            ended = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=400, env=environment)
            assert ended.returncode == 0, ascii(ended.stderr[-3000:])
            known[count] = [json.loads((out / f"{count}-{rank}.json").read_text()) for rank in range(count)]
        return known[count]

    return run


@pytest.mark.engine
@pytest.mark.parametrize("count", [2, 3])
def test_processes_find_what_one_finds_to_the_bit(run: Callable, count: int) -> None:
    (alone,) = run(1)
    for found in run(count):
        assert found["whole"] == alone["whole"]
        assert found["validation"] == alone["validation"]
        assert found["encoded"] == alone["encoded"]
        assert found["merged"] == alone["merged"]


def numbers(value: object, path: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {key: each for name, part in value.items() for key, each in numbers(part, f"{path}/{name}").items()}
    if isinstance(value, list):
        return numbers(dict(enumerate(value)), path)
    return {path: value}


@pytest.mark.engine
@pytest.mark.parametrize("count", [2, 3])
def test_processes_that_divide_the_pairs_hold_a_share_and_find_the_same_but_for_rounding(
    run: Callable, count: int
) -> None:
    (alone,) = run(1)
    assert alone["divided"] == alone["whole"]  # one process has nobody to share with
    pairs = alone["whole"]["pairs"]
    held = [found["divided"]["texts"] for found in run(count)]
    assert sum(held) == pairs
    assert max(held) - min(held) <= 1
    for found in run(count):
        assert found["divided"]["results"]["alone"]["closed"] == alone["whole"]["results"]["alone"]["closed"]
        wanted = numbers(alone["whole"]["results"])
        for name, value in numbers(found["divided"]["results"]).items():
            if "/curve/" not in name:
                assert value == pytest.approx(wanted[name], abs=1e-4), name


def test_batches_fall_to_processes_in_turn_and_none_is_lost() -> None:
    for size, batch, count in ((53, 10, 3), (40, 10, 2), (5, 10, 3), (60, 10, 3)):
        kept = []
        for rank in range(count):
            shares = Shares(size, batch, Processes(rank, count))
            drawn = [*ShareSampler(shares)]
            assert len(drawn) == len(shares) == len(ShareSampler(shares))  # all meet equally often
            own = [images for turn, images in enumerate(drawn) if shares.has_own(turn)]
            assert own == [[*each] for each in shares.of_process(rank)]
            kept += own
        assert sorted(kept) == [[*range(start, min(start + batch, size))] for start in range(0, size, batch)]


def test_one_process_gathers_its_own() -> None:
    parts = [torch.arange(3), torch.zeros(3, 2, dtype=torch.bool)]
    assert Processes().gather(parts, [3]) == [parts]
    shares = Shares(3, 2, Processes())
    assert shares.joined(parts) == parts
    assert [
        each.item() for each in shares.joined_batches([torch.tensor(2.0).double(), torch.tensor(5.0).double()])
    ] == [
        2,
        5,
    ]


def test_tensors_are_put_back_into_their_tuples() -> None:
    value = (torch.zeros(1), (torch.ones(2), torch.zeros(3)))
    found: list[Tensor] = []
    map_tensors(found.append, value)
    again = with_tensors(value, [each + 1 for each in found])
    assert again[1][0].tolist() == [2, 2]
    assert [len(found), len(again), len(again[1])] == [3, 2, 2]


def test_parts_that_miss_a_column_or_have_one_twice_are_refused() -> None:
    columns = PairColumns(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), torch.tensor([True, False, False]))
    scores, target = torch.tensor([[0.4, 0.7, 0.3], [0.1, 0.2, 0.3]]), torch.tensor([1, 0])

    def part(first: int, last: int, of: Tensor = target):
        return partial_statistics([(first, scores[:, first:last])], of, columns)

    whole = score_statistics(scores, target, columns)
    for name, one, other in zip(ScoreStatistics._fields, merge_statistics([part(1, 3), part(0, 1)], columns), whole):
        assert torch.equal(one, other), name
    with pytest.raises(ValueError, match="all 3 columns, got none for column 2"):
        merge_statistics([part(0, 2)], columns)
    with pytest.raises(ValueError, match="each column once, got columns from 1 on again"):
        merge_statistics([part(0, 2), part(1, 3)], columns)
    with pytest.raises(ValueError, match="of the same samples"):
        merge_statistics([part(0, 2), part(2, 3, target.flip(0))], columns)
    with pytest.raises(ValueError, match="to hold statistics, got none"):
        merge_statistics([], columns)
