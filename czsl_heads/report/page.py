"""The results of any command as one HTML page, which holds all of its pictures and asks for nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple, get_args

import torch
from torch import Tensor

from czsl_heads._checks import check_integer
from czsl_heads._numbers import percent
from czsl_heads.data.layout import CompositionDataset, DataError, Sample, open_image
from czsl_heads.encoders.dense import Dense
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.gap import MEANINGS, gap_reports
from czsl_heads.models.method import Method
from czsl_heads.report.curves import plot_curves, plot_feasibility, plot_study
from czsl_heads.report.findings import Finding, examine
from czsl_heads.report.maps import centres_inside, crop_transform, dense_recipes, points_inside
from czsl_heads.report.overlay import Panel, cosine_panel, data_uri, panels, png_uri, share_panel
from czsl_heads.report.routing import plot_routing, routing_of
from czsl_heads.report.scatter import plot_gap
from czsl_heads.report.table import (
    TRANSDUCTIVE,
    chance_note,
    columns_note,
    feasibility_note,
    has_feasibility,
    has_random_weights,
    options_in_words,
    results_title,
    tables,
)

GAP_IMAGES = 1000  # test images of which the gap is measured, at most
ROUTED_IMAGES = 64  # test images whose way to the experts is shown
WITHOUT_MASKS = 8  # this many times the images that are shown are looked at where no masks ask for all


class Examined(NamedTuple):
    """An image of the test split, what two models find in it, and which patches have their centre in its object.

    ``baseline`` is None where the table has no other model to look with.
    """

    sample: Sample
    finding: Finding
    baseline: Finding | None
    inside: Tensor | None

    @property
    def right(self) -> bool:
        best = self.finding.predictions[0]
        return (best.attribute, best.object) == (self.sample.attribute, self.sample.object)


def results_page(
    results: dict[str, Any],
    dataset: CompositionDataset,
    model: Method,
    baseline: Method | None = None,
    *,
    seed: int = 0,
    images: int = 6,
) -> str:
    """The page, as HTML.

    Args:
        results: Of ``czsl ablate`` or ``czsl train``.
        dataset: That it was run on.
        model: The trained model of the row that the results show, in eval mode.
        baseline: That of the row which they call the baseline, in eval mode; None where it is the same.
        seed: Of the two models; it also draws the sample of test images.
        images: How many to show of a random sample, of those predicted right, and of those predicted wrong.

    Raises:
        TypeError, ValueError: ``images`` is no positive integer, the data set is not that of the models, or an image
            or a mask is broken.
    """
    from jinja2 import Environment, StrictUndefined

    check_integer("images", images, 1)
    models = [model] if baseline is None else [model, baseline]
    if any(each.space != dataset.space for each in models):
        raise DataError(f"{dataset.root}: expected the data set that the models were trained on, got another")
    found = look_at(models, dataset, _drawn(dataset, seed, images))
    rest = found[images:]
    groups = [
        ("A random sample", found[:images]),
        ("Predicted right", [image for image in rest if image.right][:images]),
        ("Predicted wrong", [image for image in rest if not image.right][:images]),
    ]
    crop = crop_transform(model.encoder)
    every = tables(results)
    main = len(every) - len(results["studies"])
    pictured = [_plotted(plot_study, study) for study in results["studies"].values()]
    keys = results["shown"], results["baseline"]
    cards = [(title, [_card(image, crop, keys) for image in group]) for title, group in groups]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("czsl_heads.report") / "page.html").read_text(encoding="utf-8"))
    return template.render(
        results=results,
        config=results["config"],
        title=results_title(results).replace("`", ""),
        options=options_in_words(results),
        random_weights=has_random_weights(results["config"]["encoder"]),
        tables=every[:main],
        studies=list(zip(every[main:], pictured)),
        transductive={row["key"] for row in results["rows"] if row["transductive"]},
        transductive_note=TRANSDUCTIVE,
        chance_note=chance_note(results),
        columns_note=columns_note(results),
        curves=_plotted(plot_curves, results),
        feasibility=_feasibility(results),
        gaps=_plotted(plot_gap, results),
        gap=_gap(model, dataset, seed),
        routing=_routing(model, dataset),
        winners=[(row["key"], row["title"], *_winner_shares(row["by_seed"])) for row in results["rows"]],
        seed=seed,
        shown=results["shown"],
        model=model,
        behind=model if isinstance(model, Condensed) else None,
        patches=model.encoder.grid[0] * model.encoder.grid[1] + 1,
        dense=dense_recipes(model.encoder),
        looked_at=len(found),
        accuracy=sum(image.right for image in found) / len(found),
        pointing=pointing_scores(found, keys),
        masked=sum(image.inside is not None for image in found),
        groups=cards,
        uri=data_uri,
    )


def _drawn(dataset: CompositionDataset, seed: int, images: int) -> list[int]:
    """Numbers of test images in a random order: of all where there are masks to point at, else of as many as needed."""
    count = len(dataset.samples["test"])
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order if (dataset.root / "masks").is_dir() else order[: WITHOUT_MASKS * images]


def look_at(
    models: list[Method], dataset: CompositionDataset, numbers: list[int], *, batch_size: int = 64
) -> list[Examined]:
    """Examine test images, by their numbers, with one or two models, over the candidates of the closed world."""
    device = models[0].encoder.logit_scale.device
    pairs, candidates = dataset.space.pairs_on(device), dataset.eval_mask("test")
    with torch.no_grad():
        texts = [model.texts(pairs) for model in models]
    found = []
    for start in range(0, len(numbers), batch_size):
        samples = [dataset.samples["test"][number] for number in numbers[start : start + batch_size]]
        target = torch.tensor([sample.column for sample in samples])
        pictures = [open_image(sample.path) for sample in samples]
        findings = []
        for model, encoded in zip(models, texts):
            options: Any = {"candidates": candidates, "target": target, "dense": dense_recipes(model.encoder)}
            findings.append(examine(model, _batch(model, pictures), pairs, encoded, **options))
        others: list[Any] = findings[1] if len(models) > 1 else [None] * len(samples)
        inside = [_inside(sample, picture.size, dataset, models[0]) for sample, picture in zip(samples, pictures)]
        found += [Examined(*parts) for parts in zip(samples, findings[0], others, inside)]
    return found


def _batch(model: Method, pictures: list[Any]) -> Tensor:
    transform = model.encoder.transform()
    return torch.stack([transform(picture) for picture in pictures]).to(model.encoder.logit_scale.device)


def _inside(sample: Sample, size: tuple[int, int], dataset: CompositionDataset, model: Method) -> Tensor | None:
    """Which patches have their centre in the object, by the mask file of an image; None where there is none."""
    from torchvision.transforms.functional import pil_to_tensor

    path = dataset.root / "masks" / Path(sample.name).with_suffix(".png")
    if not path.exists():
        return None
    mask = open_image(path)
    if mask.size != size:
        raise DataError(f"{path}: expected a mask of the size of its image, {size}, got {mask.size}")
    pixels = pil_to_tensor(crop_transform(model.encoder, nearest=True)(mask.convert("L")))
    return centres_inside(pixels > 127, model.encoder.grid)[0]


class Pointing(NamedTuple):
    """The share of images in which something points at the object, and the standard error of that share."""

    name: str
    score: float
    error: float | None


_POINTERS = {
    "alignment": "cosine with the predicted pair",
    "labelled": "cosine with the labelled pair (oracle: it knows the label)",
    "condenser": "attention of the condenser (VAC)",
    "attention": "attention of [CLS], last block",
    **{recipe: f"cosine of dense patches ({recipe}) with the predicted pair" for recipe in get_args(Dense)[1:]},
}


def pointing_scores(found: list[Examined], keys: tuple[str, str]) -> list[Pointing]:
    """Pointing scores of all maps, and what blind pointing scores; of the images that have a mask.

    Args:
        found: Images that were looked at.
        keys: The rows of the two models.
    """
    masked = [image for image in found if image.inside is not None]
    if not masked:
        return []
    inside = torch.stack([image.inside for image in masked if image.inside is not None])
    both: list[list[Finding | None]] = [[image.finding for image in masked], [image.baseline for image in masked]]
    scores = []
    for key, findings in zip(keys, both):
        known = [finding.maps for finding in findings if finding is not None]
        for name in [name for name in _POINTERS if known and name in known[0]]:
            maps = torch.stack([each[name].patches for each in known])
            score = points_inside(maps, inside).float().mean().item()
            error = (score * (1 - score) / len(masked)) ** 0.5
            scores.append(Pointing(f"row {key}: {_POINTERS[name]}", score, error))
    fixed, chance = inside.float().mean(dim=0).max().item(), inside.float().mean().item()
    scores.append(Pointing("always the same patch, the best one in hindsight", fixed, None))
    return [*scores, Pointing("chance: a patch drawn at random", chance, None)]


def _card(image: Examined, crop: Callable[[Any], Any], keys: tuple[str, str]) -> tuple[Examined, list[Panel]]:
    picture = crop(open_image(image.sample.path))
    shown = panels(picture, image.finding.maps)
    if image.baseline is not None:
        maps = image.baseline.maps
        shown.append(cosine_panel(f"row {keys[1]}: cosine with its predicted pair", picture, maps["alignment"]))
        if "attention" in maps:
            shown.append(share_panel(f"row {keys[1]}: attention of [CLS], last block", picture, maps["attention"]))
    return image, shown


def _plotted(plot: Callable[[dict[str, Any], IO[bytes]], None], content: dict[str, Any]) -> str:
    """The address of a plot."""
    picture = BytesIO()
    plot(content, picture)
    return png_uri(picture.getvalue())


def _routing(model: Method, dataset: CompositionDataset) -> str | None:
    """The address of the picture of where words and images go, for a model with experts."""
    samples = dataset.samples["test"][:ROUTED_IMAGES]
    routing = routing_of(model, _batch(model, [open_image(sample.path) for sample in samples]))
    if routing is None:
        return None
    return _plotted(lambda content, path: plot_routing(content["routing"], path), {"routing": routing})


class _Gap(NamedTuple):
    """All metrics of the gap of one model: headings, rows of a table, and for each vector its picture in words."""

    headings: list[str]
    rows: list[list[str]]
    pictures: list[tuple[str, str]]


def _gap(model: Method, dataset: CompositionDataset, seed: int) -> _Gap | None:
    """Of at most :data:`GAP_IMAGES` test images; None where there are fewer than two."""
    if len(dataset.samples["test"]) < 2:
        return None
    reports = gap_reports(model, dataset, limit=GAP_IMAGES, seed=seed)
    metrics = next(iter(reports.values())).numbers
    rows = []
    for metric in metrics:
        values = [f"{report.numbers[metric]:.3f}" for report in reports.values()]
        rows.append([metric.replace("_", " "), *values])
    pictures = []
    for name, report in reports.items():
        address = _plotted(lambda content, path: content["report"].plot(path), {"report": report})
        pictures.append((f"{name}: {MEANINGS[name]}", address))
    return _Gap(["metric", *reports], rows, pictures)


def _feasibility(results: dict[str, Any]) -> tuple[str, str] | None:
    """The address of the plot, and what the columns mean, where the open world was also masked."""
    return (_plotted(plot_feasibility, results), feasibility_note(results)) if has_feasibility(results) else None


def _winner_shares(by_seed: list[dict[str, Any]]) -> list[str]:
    """Shares in per cent: winners that are patches (predicted pair, labelled pair), and strongly active patches."""
    gaps = [of_seed["gap"] for of_seed in by_seed]
    columns = [
        [gap["winners_that_are_patches"]["pred"] for gap in gaps],
        [gap["winners_that_are_patches"]["true"] for gap in gaps],
        [gap["patches_above_the_middle"]["pred"] for gap in gaps],
    ]
    return [
        percent({"mean": statistics.fmean(shares), "std": statistics.stdev(shares) if len(shares) > 1 else None})
        for shares in columns
    ]
