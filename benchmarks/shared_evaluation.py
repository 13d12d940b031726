"""What do several processes save in an evaluation? ``python -m benchmarks.shared_evaluation`` (10 minutes, two cores).

Time: the whole of SAC (condenser, bank filled from the training images, a bank that adapts) on a ViT-B/32 of random
weights scores the drawn shapes world, in one process on one core and in two on two, one thread each. The clock runs
from the first text to the last number: texts encoded by each process, images read, encoded and scored, batches and
scores exchanged. Not counted is the start: processes that find each other, the model, which DDP sends to all once more,
and two evaluations ahead, since a virtual machine is slow where memory is touched for the first time. Beside it stands
what the machine allows: two processes that have an evaluation each, at the same time, against one by itself.

Memory: the open world of C-GQA's numbers, 278,362 pairs of 768 numbers each, whose texts one process has, or two or
three divide. For each process the peak beyond what it had before. Text and vision tower are small, since only the size
of features matters here.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import open_clip
import torch
from PIL import Image

from benchmarks.measure import peak_memory, write_results
from benchmarks.whole_steps import SIZES, draw_space
from czsl_heads import wrap
from czsl_heads.data import CompositionDataset, make_shapes, read_dataset
from czsl_heads.models.recipe import build
from czsl_heads.training.evaluate import Evaluation
from czsl_heads.training.options import load_options
from czsl_heads.training.rows import BankPlan, Readout
from czsl_heads.training.trainer import quiet, testing_trainer

SEED = 0
Part = Literal["time", "memory"]
PLAN = BankPlan(16)
READOUTS = {
    "alone": Readout(),
    "bank": Readout(0.5, 0.5, PLAN),
    "bank that adapts": Readout(0.5, 0.5, PLAN._replace(texts=True, updates=True)),
}
SMALL_VISION = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32}
SMALL_TEXT = {"context_length": 77, "width": 64, "heads": 2, "layers": 1}


def draw_large(root: Path, *, images: int = 16, scale: float = 1.0) -> Path:
    """A data set with C-GQA's numbers of primitives and pairs, and few images."""
    space, split = draw_space(SIZES["C-GQA"], scale), root / "compositional-split-natural"
    split.mkdir(parents=True)
    names = [*space]
    seen, unseen = names[: int(space.seen_mask.sum())], names[int(space.seen_mask.sum()) :]
    for name, pairs in (("train", seen), ("val", seen), ("test", seen + unseen)):
        lines = "".join(f"{attribute.replace(' ', '')} {obj.replace(' ', '')}\n" for attribute, obj in pairs)
        (split / f"{name}_pairs.txt").write_text(lines, encoding="utf-8")
    rows = []
    for number in range(3 * images):
        tested_unseen = number < images and number % 2 == 0
        attribute, obj = unseen[number] if tested_unseen else seen[number]
        part = ("test", "train", "val")[number // images]
        row = {"image": f"{number}.png", "attr": attribute.replace(" ", ""), "obj": obj.replace(" ", ""), "set": part}
        (root / "images").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(root / "images" / row["image"])
        rows.append(row)
    torch.save(rows, root / "metadata_compositional-split-natural.t7")
    return root


class Timed(Evaluation):
    """Knows how long it took, without the trainer's start."""

    seconds = 0.0

    def on_test_epoch_start(self) -> None:
        self.seconds = -time.perf_counter()
        super().on_test_epoch_start()

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self.seconds += time.perf_counter()


def evaluation_of(part: Part, dataset: CompositionDataset, images: int) -> Any:
    """A function that makes the evaluation anew: banks and metrics start empty."""
    torch.manual_seed(SEED)
    if part == "memory":
        small = wrap(open_clip.CLIP(768, SMALL_VISION, SMALL_TEXT).eval())
        options, _ = load_options("csp", "cgqa", {"workers": 0})
        method = build(options.recipe("csp", "small", "max"), dataset.space, encoder=small).eval()
        return lambda: Timed(method, dataset, options, {"alone": Readout()}, worlds=("open",))

    options, _ = load_options("sac", "shapes", {"workers": 0, "eval_batch_size": images})
    encoder = wrap("ViT-B-32-quickgelu")
    model = build(options.recipe("sac", "ViT-B-32-quickgelu", "max", condenser=True), dataset.space, encoder=encoder)
    return lambda: Timed(model.eval(), dataset, options, READOUTS)


def work(part: Part, root: Path, out: Path, images: int, rounds: int) -> None:
    """What one of the processes does, which torchrun has started."""
    logging.disable(logging.WARNING)
    count = int(os.environ["WORLD_SIZE"])
    dataset = read_dataset(root, allow_untrained_primitives=True)
    make = evaluation_of(part, dataset, images)
    flags = {"accelerator": "cpu", "devices": count, "enable_progress_bar": False}
    flags |= {"strategy": "ddp"} if count > 1 else {}

    def evaluate() -> Timed:
        evaluation: Timed = make()
        with quiet():
            testing_trainer(flags).test(evaluation, verbose=False)
        return evaluation

    found: dict[str, Any]
    if part == "memory":
        found = {"bytes": peak_memory(evaluate, runs=1), "auc": evaluate().results["alone"]["open"]["exact"].auc}
    else:
        for _ in range(2):
            evaluation = evaluate()
        seconds = [evaluate().seconds for _ in range(rounds)]
        found = {"seconds": seconds, "results": evaluation.as_dicts()}
    (out / f"{part}-{count}-{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


def started(part: Part, count: int, root: Path, out: Path, **numbers: int) -> list[dict[str, Any]]:
    """What each of so many processes of one thread found."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    given = [f"--{name}={value}" for name, value in numbers.items()]
    command = [*launcher, "-m", "benchmarks.shared_evaluation", f"--part={part}", f"--root={root}", f"--out={out}"]
    subprocess.run([*command, *given], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [json.loads((out / f"{part}-{count}-{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]


def two_at_once(root: Path, out: Path, **numbers: int) -> list[dict[str, Any]]:
    """What two processes found that know nothing of each other."""
    folders = [out / "first", out / "second"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(started, "time", 1, root, folder, **numbers) for folder in folders]
        return [each.result()[0] for each in waiting]


def measure_time(folder: Path, images_per_pair: int, batch: int, rounds: int) -> dict[str, Any]:
    numbers = {"train_per_pair": images_per_pair, "val_per_pair": 1, "test_per_pair": images_per_pair}
    root = make_shapes(folder / "shapes", **numbers)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    results, apart = [], []
    for _ in range(2):  # in turn
        for count, measured in seconds.items():
            processes = started("time", count, root, folder, images=batch, rounds=rounds)
            measured.extend(processes[0]["seconds"])
            results.extend(process["results"] for process in processes)
        for at_once in two_at_once(root, folder, images=batch, rounds=rounds):
            apart.extend(at_once["seconds"])
    assert all(result == results[0] for result in results), "expected equal numbers of one process and of two"
    dataset = read_dataset(root)
    return {
        "images": len(dataset.samples["train"]) + len(dataset.samples["test"]),
        "batch": batch,
        "seconds": {str(count): round(median(measured), 2) for count, measured in seconds.items()},
        "times_faster": round(median(seconds[1]) / median(seconds[2]), 2),
        "machine_allows": round(2 * median(seconds[1]) / median(apart), 2),
        "numbers": "equal to the bit",
    }


def measure_memory(folder: Path, scale: float) -> dict[str, Any]:
    root = draw_large(folder / "large", scale=scale)
    space = read_dataset(root, allow_untrained_primitives=True).space.open_world()
    found: dict[str, Any] = {"pairs": len(space), "megabytes_of_features": round(len(space) * 768 * 4 / 1e6)}
    for count in (1, 2, 3):
        processes = started("memory", count, root, folder)
        found[f"megabytes_of_{count}"] = [round(process["bytes"] / 1e6) for process in processes]
        found[f"auc_of_{count}"] = processes[0]["auc"]
    return found


def main(
    part: Part | None = None,
    root: Path | None = None,
    out: Path | None = None,
    images: int = 8,
    images_per_pair: int = 1,
    rounds: int = 3,
    scale: float = 1.0,
    name: str = "shared_evaluation",
) -> None:
    """Measure, print and write ``results/NAME.json``.

    Args:
        part: Of a process that this command has started; not to be given.
        root: Likewise, its data set.
        out: Likewise, where it writes what it found.
        images: Images of a batch.
        images_per_pair: For training, and for the test.
        rounds: How often an evaluation is timed, twice.
        scale: The part of C-GQA's numbers, to try the script.
        name: Of the results.
    """
    if part is not None:
        assert root is not None
        assert out is not None
        work(part, root, out, images, rounds)
        return
    question = "What do several processes save in an evaluation?"
    with TemporaryDirectory() as folder:
        found = {"time": measure_time(Path(folder), images_per_pair, images, rounds)}
        print(found, flush=True)
        found["memory"] = measure_memory(Path(folder), scale)
        print(found["memory"], flush=True)
    write_results(name, question, SEED, {"threads_per_process": 1, **found})


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
