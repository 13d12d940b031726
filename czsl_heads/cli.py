"""The ``czsl`` command: data sets, training, tables, evaluation, reports, predictions, and what CLIPs there are."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from czsl_heads.models.method import Method


def make_shapes(**arguments: Any) -> int:
    """Write a shapes data set; the arguments are those of :func:`czsl_heads.data.make_shapes`."""
    from czsl_heads.data.shapes import make_shapes as make_dataset

    print(f"wrote {make_dataset(**arguments)}")
    return 0


def check(
    root: Path,
    dataset: Literal["ut-zappos", "mit-states", "cgqa"] | None = None,
    allow_untrained_primitives: bool = False,
    allow_outside: bool = False,
    upright: bool | None = None,
    names: str = "published",
    json: bool = False,
) -> int:
    """Read a data set in the field's layout, decode every image, and print what is wrong and what is odd.

    Args:
        root: Folder of the data set.
        dataset: The published set that it should be: its counts and the digests of its pair lists are compared.
        allow_untrained_primitives: Accept validation and test pairs with words that no training pair has.
        allow_outside: Accept images outside of the folder.
        upright: Turn images as their EXIF orientation says; default: yes, unless it is a published set.
        names: What prompts say of its names: "published", "clean", or a file of replacements.
        json: Print all of it as JSON.

    Returns:
        0 if it is fit to train on, else 1.
    """
    from json import dumps

    from czsl_heads.data.integrity import check as check_dataset
    from czsl_heads.report.terminal import shown_progress

    report = check_dataset(
        root,
        dataset=dataset,
        allow_untrained_primitives=allow_untrained_primitives,
        allow_outside=allow_outside,
        upright=upright,
        names=names,
        progress=shown_progress,
    )
    print(dumps(report.as_dict(), indent=2, ensure_ascii=False) if json else report)
    return 0 if report.ok else 1


def import_data(source: Path, **arguments: Any) -> int:
    """Make a data set of a list or of folders; the arguments are those of :func:`czsl_heads.data.import_dataset`."""
    from czsl_heads.data.importing import import_dataset

    print(import_dataset(source, **arguments))
    return 0


def split_data(root: Path, **arguments: Any) -> int:
    """Draw seen and unseen pairs; the arguments are those of :func:`czsl_heads.data.split_dataset`."""
    from czsl_heads.data.splitting import split_dataset

    print(split_dataset(root, **arguments))
    return 0


def train(out: Path, **arguments: Any) -> int:
    """Train one model of any method, choose its epoch by validation, test it, and write it to a folder.

    Writes results.json, results.md, curves.png and the model. The same command on the same folder resumes what was
    interrupted; ``czsl predict``, ``evaluate``, ``report`` and ``czsl_heads.load`` take the folder.

    Args:
        out: Folder for the model: new, empty, or of the same command.
        arguments: Those of :func:`czsl_heads.training.config.configure_model`.

    Returns:
        0.
    """
    from czsl_heads.training.config import configure_model

    return _run(out, configure_model(**arguments), "results.md")


def ablate(out: Path, **arguments: Any) -> int:
    """Train and test the rows of a table, print it and write it to a folder.

    Writes results.json, ablation.md, curves.png and a picture of each study, and feasibility.png with --world open. The
    same command on the same folder resumes what was interrupted.

    Args:
        out: Folder for the results: new, empty, or of an ablation with the same settings.
        arguments: Those of :func:`czsl_heads.training.config.configure`.

    Returns:
        0.
    """
    from czsl_heads.training.config import configure

    return _run(out, configure(**arguments), "ablation.md")


def _run(out: Path, config: Any, page: str) -> int:
    """Train what a configuration asks for, and write its results, its page and its pictures."""
    from czsl_heads._files import write_text
    from czsl_heads.report.curves import plot_curves, plot_feasibility, plot_study
    from czsl_heads.report.table import has_feasibility, print_results, results_markdown
    from czsl_heads.training.ablate import run_ablation
    from czsl_heads.training.holder import Holder
    from czsl_heads.training.trainer import is_main_process

    with Holder(out) as holder:
        results = run_ablation(out, config, holder)
        if not is_main_process():
            return 0
        plot_curves(results, out / "curves.png")
        masked = has_feasibility(results)
        if masked:
            plot_feasibility(results, out / "feasibility.png")
        for name, study in results["studies"].items():
            plot_study(study, out / f"study-{name}.png")
        write_text(out / page, results_markdown(results))
    print_results(results)
    print(f"wrote results.json, {page}{', feasibility.png' if masked else ''} and curves.png to {out}")
    return 0


def evaluate(
    run: Path,
    data: Path | None = None,
    split: Literal["train", "val", "test"] = "test",
    world: Literal["closed", "open"] = "closed",
    feasibility: str | None = None,
    masking: Literal["clean", "official"] | None = None,
    rows: list[str] | None = None,
    out: Path | None = None,
    trainer: dict[str, Any] | None = None,
) -> int:
    """Score the models of a folder again: on another split, on other data, or with the open world masked.

    Args:
        run: Folder of a finished czsl train or ablate, of any method.
        data: Another data set, whose words the models know; default: that of the folder. Memory banks are filled from
            its training images.
        split: The split to score.
        world: "open" also masks the open world's scores by feasibility, at a threshold searched on validation images.
        feasibility: With --world open: "encoder", a .pt file of the field, or word vectors as text; default: that of
            the folder, else "encoder".
        masking: With --world open: "clean" or "official"; default: that of the folder, else "clean".
        rows: Rows of the table to score, such as [max, bank]; default: all whose models are kept.
        out: File for the results as JSON; default: they are printed only.
        trainer: Flags of Lightning's Trainer; default: those of the folder, on one device.

    Returns:
        0.
    """
    from czsl_heads._sealed import write_sealed
    from czsl_heads.report.table import print_results
    from czsl_heads.training.finished import evaluate as score_again
    from czsl_heads.training.trainer import is_main_process

    masked: dict[str, Any] = {"world": world, "feasibility": feasibility, "masking": masking}
    results = score_again(run, data=data, split=split, rows=rows, trainer=trainer, **masked)
    if not is_main_process():
        return 0
    print_results(results)
    if out is not None:
        with _writable("out", out):
            write_sealed(out, results)
        print(f"wrote {out}")
    return 0


def tune(run: Path, data: Path | None = None, seed: int | None = None) -> int:
    """Pick beta and gamma of the fusion by the AUC on validation images, from one pass for each seed.

    Writes tune.json into the folder; its table stays as it is.

    Args:
        run: Folder of a finished czsl train or ablate, with a condenser and a memory bank.
        data: Where its data set is now, if it was moved.
        seed: Which seed's model; default: the mean over all seeds.

    Returns:
        0.
    """
    from czsl_heads.training.finished import dataset_of, one_device
    from czsl_heads.training.trainer import is_main_process
    from czsl_heads.training.tune import TUNED
    from czsl_heads.training.tune import tune as tune_weights

    results, _ = _finished(run, seed)
    config = results["config"]
    model = next((row["model"] for row in results["rows"] if row["readout"]["bank"] is not None), None)
    if model is None:
        raise ValueError(f"expected `run` with a memory bank (--add vac --add bank), got {run}, which has none")
    seeds = config["seeds"] if seed is None else [seed]
    found = tune_weights(run, dataset_of(run, config, data), model, seeds, one_device(config["trainer"]))
    if not is_main_process():
        return 0
    for name in ("used", "best"):
        point = found[name]
        print(f"{name}: beta {point['beta']}, gamma {point['gamma']}, validation AUC {100 * point['auc']:.2f} %")
    best = found["best"]
    print(f"for a new training: --options.beta {best['beta']} --options.gamma {best['gamma']}; wrote {run / TUNED}")
    return 0


def report(
    run: Path, out: Path | None = None, data: Path | None = None, seed: int | None = None, images: int = 6
) -> int:
    """Write results as one HTML page that opens from disk: tables, plots, and what the models look at.

    Args:
        run: Folder of a finished czsl train or ablate, of any method.
        out: File to write; default: report.html in that folder.
        data: Where its data set is now, if it was moved.
        seed: Which seed's models look at the images; default: the first.
        images: How many images of each kind to show: drawn at random, predicted right, predicted wrong.

    Returns:
        0.
    """
    from czsl_heads._files import write_text
    from czsl_heads.report.page import results_page
    from czsl_heads.training.finished import dataset_of

    results, seed = _finished(run, seed)
    dataset = dataset_of(run, results["config"], data)
    model = _model(run, seed)
    other = results["baseline"] if results["baseline"] != results["shown"] else None
    baseline = None if other is None else _model(run, seed, other)
    page = results_page(results, dataset, model, baseline, seed=seed, images=images)
    path = run / "report.html" if out is None else out
    with _writable("out", path, "file"):
        write_text(path, page)
    print(f"wrote {path}")
    return 0


def predict(
    images: list[Path],
    run: Path,
    seed: int | None = None,
    row: str | None = None,
    world: Literal["closed", "open"] = "closed",
    top: int = 5,
    out: Path = Path(),
    data: Path | None = None,
) -> int:
    """Print the best pairs of images with their parts, and save what the model looks at as IMAGE-maps.png.

    Images are read one at a time. One that cannot be read is named, and the others are predicted all the same.

    Args:
        images: Image files.
        run: Folder of a finished czsl train or ablate of any method, or of one saved model.
        seed: Which seed's model; default: the first.
        row: Which row of the table predicts; default: the one that the report shows.
        world: Candidates: the pairs of the data set (closed), or every attribute with every object (open). The memory
            bank is over the former, and has no part where the latter are more.
        top: How many pairs to print.
        out: Folder for the pictures.
        data: The data set of the run, wherever it is now: an IMAGE that is no file is looked for among its images.

    Returns:
        0, or 1 if an image could not be read.
    """
    import torch

    from czsl_heads._checks import check_integer
    from czsl_heads.data.images import DataError, open_image
    from czsl_heads.models.condensed import Condensed
    from czsl_heads.report.findings import examine
    from czsl_heads.report.maps import crop_transform
    from czsl_heads.report.overlay import panels, save_strip
    from czsl_heads.report.terminal import print_finding

    check_integer("top", top, 1)
    images = images if data is None else _images_of(images, run, data)
    model = _model(run, seed, row)
    device = model.encoder.logit_scale.device
    space = model.space if world == "closed" else model.space.open_world()
    if isinstance(model, Condensed) and model.bank is not None and space != model.space:
        print("open world: the memory bank, which is over the pairs of the data set, has no part")
        model.bank = None
    pairs = space.pairs_on(device)
    with torch.no_grad():
        texts = model.texts(pairs)

    transform, crop = model.encoder.transform(), crop_transform(model.encoder)
    bad: list[Path] = []
    for path, target in zip(images, _map_paths(images, out)):
        try:
            image = open_image(path)
        except DataError as error:
            print(f"czsl predict: {error}", file=sys.stderr)
            bad.append(path)
            continue
        finding = examine(model, transform(image)[None].to(device), pairs, texts, top=top)[0]
        print_finding(str(path), finding)
        best = finding.predictions[0]
        with _writable("out", out):
            save_strip(f"{path.name}: {best.attribute} {best.object}", panels(crop(image), finding.maps), target)
        print(f"wrote {target}")
    if bad:
        print(f"czsl predict: {len(bad)} of {len(images)} images not read: {_named(bad)}", file=sys.stderr)
    return 1 if bad else 0


def _images_of(images: list[Path], run: Path, data: Path) -> list[Path]:
    """Images, of which those that are no files are looked for in the data set of a run."""
    from czsl_heads.data.files import ImageFiles
    from czsl_heads.training.finished import dataset_of

    results, _ = _finished(run)
    dataset_of(run, results["config"], data)
    files = ImageFiles(data, allow_outside=bool(results["config"].get("allow_outside")))
    found: list[Path] = []
    for image in images:
        inside = None if image.exists() else files.find({"image": str(image)})
        found.append(image if inside is None else Path(files.folder, inside))
    return found


def _named(paths: list[Path]) -> str:
    more = f" and {len(paths) - 10} more" if len(paths) > 10 else ""
    return ", ".join(map(str, paths[:10])) + more


def bench(
    encoders: str,
    data: Path,
    out: Path,
    align: str = "cls,max",
    split: Literal["train", "val", "test"] = "test",
    world: Literal["closed", "open"] = "closed",
    context: str = "a photo of",
    topk: int = 4,
    batch_size: int = 64,
    upright: bool | None = None,
    names: str = "published",
    allow_untrained_primitives: bool = False,
    allow_outside: bool = False,
    loader: bool = False,
    trainer: dict[str, Any] | None = None,
) -> int:
    """Score CLIPs zero-shot on a data set, print a table, and write bench.csv and bench.png to a folder.

    With --loader true nothing is scored: the table, loader.csv, says how many images per second loaders give and the
    CLIPs take, in evaluation and in training.

    Args:
        encoders: Names of CLIPs, with commas between; czsl encoders lists what there is.
        data: The data set, in the field's layout.
        out: Folder for the table and the picture; what it holds of an earlier call is replaced.
        align: How images meet texts, with commas between: cls (the image feature), or max, topk, logsumexp or mean over
            all tokens.
        split: The split to score.
        world: Candidates: the data set's pairs (closed), or every attribute with every object (open).
        context: The words in front of each pair.
        topk: How many tokens topk takes.
        batch_size: Images at once.
        upright: Turn images as their EXIF orientation says; default: yes, unless it is a published set.
        names: What prompts say of the data set's names: "published", "clean", or a file of replacements.
        allow_untrained_primitives: Accept validation and test pairs with words that no training pair has.
        allow_outside: Accept images outside of the data set's folder.
        loader: Measure the stream of images instead.
        trainer: Flags of lightning.Trainer: accelerator, devices, precision.

    Returns:
        0, or 1 if a CLIP could not be had; the others are scored all the same.
    """
    from czsl_heads.data.layout import read_dataset
    from czsl_heads.report.terminal import print_bench
    from czsl_heads.training.bench import bench as score
    from czsl_heads.training.bench import plot_bench

    tried = [name.strip() for name in encoders.split(",")]
    aligns = cast(list[Any], align.split(","))
    options: dict[str, Any] = {"split": split, "world": world, "context": context, "topk": topk}
    dataset = read_dataset(
        data,
        upright=upright,
        names=names,
        allow_untrained_primitives=allow_untrained_primitives,
        allow_outside=allow_outside,
    )
    if loader:
        return _bench_loader(tried, dataset, out, split, batch_size, trainer or {})
    with _writable("out", out):
        rows = score(tried, dataset, out, aligns=aligns, batch_size=batch_size, trainer=trainer, **options)
        plot_bench(rows, out / "bench.png")
    print_bench(rows)
    print(f"wrote bench.csv and bench.png to {out}")
    failed = [row for row in rows if row.get("error")]
    for row in failed:
        print(f"{row['encoder']}: {row['error']}", file=sys.stderr)
    return 1 if failed else 0


def _bench_loader(
    encoders: list[str], dataset: Any, out: Path, split: str, batch_size: int, trainer: dict[str, Any]
) -> int:
    from czsl_heads.report.terminal import print_loader
    from czsl_heads.training.loader_rates import loader_rates

    for name in trainer.keys() - {"accelerator", "precision"}:
        raise ValueError(f"expected no `trainer.{name}` with --loader true, got {trainer[name]!r}")
    settings = {"split": split, "batch_size": batch_size, "precision": trainer.get("precision", "32-true")}
    device = "cpu" if trainer.get("accelerator") == "cpu" else None
    with _writable("out", out):
        rows = loader_rates(encoders, dataset, out, device=device, **settings)
    print_loader(rows)
    print(f"wrote loader.csv to {out}")
    return 0


def gap(
    data: Path,
    out: Path,
    encoder: str | None = None,
    run: Path | None = None,
    row: str | None = None,
    seed: int | None = None,
    split: Literal["train", "val", "test"] = "test",
    context: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    upright: bool | None = None,
    names: str = "published",
    allow_untrained_primitives: bool = False,
    allow_outside: bool = False,
) -> int:
    """Measure the gap between a data set's images and texts, print all metrics, and write them with pictures.

    Writes gap.json, and gap-VECTOR.png for each vector that may stand for an image.

    Args:
        data: The data set, in the field's layout.
        out: Folder for the results; what it holds of an earlier call is replaced.
        encoder: Name of a CLIP, whose texts are sentences; default: tiny; czsl encoders lists what there is.
        run: Measure a trained model instead, by its own texts: folder of a finished czsl train or ablate, or of one
            saved model.
        row: Which row of the table; default: the one that the report shows.
        seed: Which seed's model; default: the first.
        split: The split to look at.
        context: With --encoder: the words in front of each pair; default: "a photo of".
        limit: Look at so many images, drawn at random; default: all.
        batch_size: Images at once.
        upright: Turn images as their EXIF orientation says; default: yes, unless it is a published set.
        names: What prompts say of the data set's names: "published", "clean", or a file of replacements.
        allow_untrained_primitives: Accept validation and test pairs with words that no training pair has.
        allow_outside: Accept images outside of the data set's folder.

    Returns:
        0.
    """
    import torch

    from czsl_heads._files import write_json
    from czsl_heads.data.layout import read_dataset
    from czsl_heads.data.shapes import beyond_shapes
    from czsl_heads.models.gap import MEANINGS, gap_reports
    from czsl_heads.models.recipe import Recipe, build
    from czsl_heads.report.terminal import print_gap

    needless = {"row": row, "seed": seed} if run is None else {"encoder": encoder, "context": context}
    for name, value in needless.items():
        if value is not None:
            rule = "with `run` only" if run is None else "without `run` only"
            raise ValueError(f"expected `{name}` {rule}, got {value!r}")
    dataset = read_dataset(
        data,
        upright=upright,
        names=names,
        allow_untrained_primitives=allow_untrained_primitives,
        allow_outside=allow_outside,
    )
    if run is None:
        encoder = encoder or "tiny"
        if told := beyond_shapes(encoder, dataset.space):
            print(told, file=sys.stderr)
        options = {"context": "a photo of" if context is None else context}
        model = build(Recipe("clip", encoder, "cls", model=options), dataset.space).eval()
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    else:
        model = _model(run, seed, row)
    reports = gap_reports(model, dataset, split=split, batch_size=batch_size, limit=limit)

    about = {"data": data.name, "split": split, "encoder": encoder, "row": row, "seed": seed}
    with _writable("out", out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "gap.json", about | {"vectors": {name: each.as_dict() for name, each in reports.items()}})
        for name, report in reports.items():
            report.plot(out / f"gap-{name}.png", title=f"{data.name}, {split}: {MEANINGS[name]}")
    print_gap(reports)
    print(f"wrote gap.json and gap-{{{','.join(reports)}}}.png to {out}")
    return 0


def encoders(json: bool = False) -> int:
    """Print what CLIPs there are: packages, architectures, encoders of other packages, and weights on this machine.

    Args:
        json: Print all of it as JSON, with every architecture, its tags, and why the others cannot be wrapped.

    Returns:
        0.
    """
    from json import dumps

    from czsl_heads.encoders.listing import list_encoders
    from czsl_heads.report.terminal import print_encoders

    found = list_encoders()
    if json:
        print(dumps(found, indent=2, ensure_ascii=False))
        return 0
    print_encoders(found)
    return 0


def _finished(run: Path, seed: int | None = None) -> tuple[dict[str, Any], int]:
    """The results of a finished command, and the seed to use."""
    from czsl_heads.training.finished import finished

    return finished(run, seed)


def _model(run: Path, seed: int | None = None, row: str | None = None) -> Method:
    """A trained model, on the GPU if there is one."""
    import torch

    from czsl_heads.models.saved import load

    if row is not None or seed is not None or not (run / "model.safetensors").exists():
        _finished(run, seed)
    model: Method = load(run, row=row, seed=seed)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _writable(argument: str, path: Path, kind: str = "folder") -> Iterator[None]:
    """Say which argument names a place that cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"expected `{argument}` to be a {kind} that can be written, got {path} ({error.strerror})"
        ) from error


def _map_paths(images: list[Path], out: Path) -> list[Path]:
    """Where the maps of each image go: a file of its own, and none of the images."""
    taken, paths = {path.resolve() for path in images}, []
    for image in images:
        numbered = (out / f"{image.stem}{f'-{number}' if number > 1 else ''}-maps.png" for number in count(1))
        paths.append(next(path for path in numbered if path.resolve() not in taken))
        taken.add(paths[-1].resolve())
    return paths


_COMMANDS: dict[str, Callable[..., int]] = {
    "make-shapes": make_shapes,
    "check": check,
    "import": import_data,
    "split": split_data,
    "train": train,
    "ablate": ablate,
    "evaluate": evaluate,
    "tune": tune,
    "report": report,
    "predict": predict,
    "bench": bench,
    "gap": gap,
    "encoders": encoders,
}
_RESUMED = ("train", "ablate")
# jsonargparse reads items of a mapping one level deep: `--options.bank.slots 4` becomes `--options.bank/slots 4`.
_DOTTED = re.compile(r"^(--options\.)([^=]+)")


def _one_level(flag: re.Match[str]) -> str:
    return flag[1] + flag[2].replace(".", "/")


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from czsl_heads import __version__
    from czsl_heads.data.importing import import_dataset
    from czsl_heads.data.shapes import make_shapes as make_dataset
    from czsl_heads.data.splitting import split_dataset
    from czsl_heads.training.config import configure, configure_model

    parser = ArgumentParser(
        prog="czsl", description="Compositional zero-shot learning on any CLIP.", version=__version__
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subcommands(required=True)
    shapes = ArgumentParser(description="Write a shapes data set to disk, in the field's own layout.")
    shapes.add_function_arguments(make_dataset)
    commands.add_subcommand("make-shapes", shapes, help="draw a data set")
    checking = ArgumentParser(description="Read a data set, decode every image, and say what is wrong and what is odd.")
    checking.add_function_arguments(check, as_positional=True, skip={"json"})
    checking.add_argument("--json", action="store_true", help="all of it, as JSON")
    commands.add_subcommand("check", checking, help="check a data set on disk")
    importing = ArgumentParser(description="Make a data set of a list of images, or of folders named by labels.")
    importing.add_argument("source", type=Path, help="a CSV, TSV or JSONL file; or a folder")
    importing.add_function_arguments(import_dataset, skip={"source", "copy", "link"})
    importing.add_argument("--copy", action="store_true", help="copy the images into the data set")
    importing.add_argument("--link", action="store_true", help="link to the images from within the data set")
    commands.add_subcommand("import", importing, help="make a data set of your own images")
    splitting = ArgumentParser(description="Draw seen and unseen pairs for a data set that has no split yet.")
    splitting.add_argument("root", type=Path, help="folder of the data set")
    splitting.add_function_arguments(split_dataset, skip={"root"})
    commands.add_subcommand("split", splitting, help="draw seen and unseen pairs")

    training = ArgumentParser(description="Train one model of any method on a data set, and test it.")
    _add_training(training, configure_model)
    commands.add_subcommand("train", training, help="train one model")
    ablating = ArgumentParser(description="Train and test the rows of a table: SAC's ablation, or a method with heads.")
    _add_training(ablating, configure)
    commands.add_subcommand("ablate", ablating, help="reproduce a table")

    evaluating = ArgumentParser(description="Score finished models again: another split, other data, the open world.")
    evaluating.add_function_arguments(evaluate, as_positional=True)
    commands.add_subcommand("evaluate", evaluating, help="score finished models again")
    tuning = ArgumentParser(description="Pick beta and gamma of the fusion by the AUC on validation images.")
    tuning.add_function_arguments(tune, as_positional=True)
    commands.add_subcommand("tune", tuning, help="pick the weights of the fusion")
    reporting = ArgumentParser(description="Write finished results as one HTML page that opens from disk.")
    reporting.add_function_arguments(report, as_positional=True)
    commands.add_subcommand("report", reporting, help="write results as one HTML page")
    predicting = ArgumentParser(description="Print the best pairs of images, and save what the model looks at.")
    predicting.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    predicting.add_function_arguments(predict, skip={"images"})
    commands.add_subcommand("predict", predicting, help="name what is on images")
    benching = ArgumentParser(description="Score CLIPs zero-shot on a data set: one table, one picture.")
    benching.add_function_arguments(bench)
    commands.add_subcommand("bench", benching, help="compare CLIPs on a data set, zero-shot")
    measuring = ArgumentParser(description="Measure the gap between a data set's images and texts, in all metrics.")
    measuring.add_argument("data", type=Path, help="the data set, in the field's layout")
    measuring.add_function_arguments(gap, skip={"data"})
    commands.add_subcommand("gap", measuring, help="measure the gap between images and texts")
    listing = ArgumentParser(description="Print what CLIPs there are, and by which names they are asked for.")
    listing.add_argument("--json", action="store_true", help="all of it, as JSON")
    commands.add_subcommand("encoders", listing, help="list the CLIPs that can be had here")
    return parser


def _add_training(parser: ArgumentParser, configure: Callable[..., Any]) -> None:
    """The arguments of a configuration, its folder, and a file that may hold any of them."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the results: new, empty, or to resume")
    parser.add_function_arguments(configure, skip={"quick", "add"})
    parser.add_argument("--quick", action="store_true", help="fewer images and epochs, to check that everything runs")
    parser.add_argument("--add", action="append", metavar="{vac,bank}", help=_ADD)
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments")


_ADD = "vac: a condenser behind the method; --add vac --add bank: a memory bank of its vectors, too"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; an error ends in one line on stderr and exit status 1 (usage: 2; interrupted: 130).

    ``--debug``, anywhere among the arguments, shows the traceback, too.
    """
    from czsl_heads._complaints import complaint
    from czsl_heads.data.images import quiet_pillow

    command = ""
    if arguments is None:
        _restart_in_utf8()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter is no reason to stop
    quiet_pillow()
    given = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in given
    try:
        parsed = _parser().parse_args([_DOTTED.sub(_one_level, each) for each in given if each != "--debug"])
        command = parsed.subcommand
        values = parsed[command].as_dict()
        values.pop("config", None)
        if values.get("options"):
            values["options"] = {name.replace("/", "."): value for name, value in values["options"].items()}
        if values.get("add", ()) is None:
            del values["add"]
        status = _COMMANDS[command](**values)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _leave_pipe()
        return 1
    except KeyboardInterrupt:
        hint = "; the same command resumes it" if command in _RESUMED else ""
        print(f"\n{f'czsl {command}'.strip()}: interrupted{hint}", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"{f'czsl {command}'.strip()}: {complaint(error, command)}", file=sys.stderr)
        return 1


def _leave_pipe() -> None:
    """Whoever read the output has gone: Python would complain once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _restart_in_utf8() -> None:
    """Start again in Python's UTF-8 mode (PEP 540) where the locale could not even name every file."""
    if sys.flags.utf8_mode or sys.getfilesystemencoding().lower() in ("utf-8", "utf8"):
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})


if __name__ == "__main__":
    sys.exit(main())
