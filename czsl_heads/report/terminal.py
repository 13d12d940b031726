"""Tables of the terminal: an image's best pairs, many CLIPs without training, the CLIPs that there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    from czsl_heads.metrics.gap_report import GapReport
    from czsl_heads.report.findings import Finding


def shown_progress(steps: Iterable[Any], count: int) -> Iterator[Any]:
    """The same steps, with a bar on stderr that shows how far they are."""
    yield from track(steps, "decoding", total=count, console=Console(stderr=True), transient=True)


def print_finding(title: str, finding: Finding) -> None:
    """The best pairs of an image, with the parts of their scores."""
    parts = list(finding.predictions[0].parts)
    table = Table("pair", title=escape(title), title_justify="left")
    for heading in ("score", *parts):
        table.add_column(heading, justify="right")
    for row in finding.predictions:
        numbers = [row.score, *(row.parts[name] for name in parts)]
        table.add_row(escape(f"{row.attribute} {row.object}"), *(f"{number:.3f}" for number in numbers))
    Console().print(table)


def print_bench(rows: list[dict[str, Any]]) -> None:
    """The rows of :func:`czsl_heads.training.bench.bench` that have numbers."""
    table = Table("encoder", "align", title="zero-shot, exact protocol (%)", title_justify="left")
    columns = {"auc": "AUC", "harmonic_mean": "HM", "seen": "seen", "unseen": "unseen"}
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for row in rows:
        if row.get("error"):
            continue
        table.add_row(escape(row["encoder"]), row["align"], *(f"{100 * row[name]:.1f}" for name in columns))
    Console().print(table)


def print_loader(rows: list[dict[str, Any]]) -> None:
    """The rows of :func:`czsl_heads.training.loader_rates.loader_rates`."""
    table = Table("use", "pictures", title="images per second", title_justify="left")
    for heading in ("workers", "loader", "encoder", "takes", "loader / encoder"):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = (str(row["workers"]), str(row["loader_images_per_second"]), escape(row["encoder"]))
        ratio = f"{row['loader_by_encoder']:.2f}"
        table.add_row(row["use"], row["pictures"], *numbers, str(row["encoder_images_per_second"]), ratio)
    Console().print(table)


def print_gap(reports: dict[str, GapReport]) -> None:
    """All metrics of the gap, a column for each vector that stands for an image."""
    table = Table("metric", title="the gap between images and texts", title_justify="left")
    for name in reports:
        table.add_column(name, justify="right")
    for metric in next(iter(reports.values())).numbers:
        table.add_row(metric.replace("_", " "), *(f"{report.numbers[metric]:.4f}" for report in reports.values()))
    Console().print(table)


def print_encoders(found: dict[str, Any]) -> None:
    """What :func:`czsl_heads.encoders.listing.list_encoders` found."""
    packages = (f"{name} {version or 'not installed'}" for name, version in found["containers"].items())
    print(f"packages: {', '.join(packages)}")
    table = Table("vision tower", title="Architectures of open_clip", title_justify="left")
    table.add_column("wrap", justify="right")
    table.add_column("with tags", justify="right")
    table.add_column("such as", overflow="fold")  # whole: to be copied
    for family, members in found["architectures"].items():
        tagged = {name: tags for name, tags in members.items() if tags}
        one = next((f"{name}:{tags[0]}" for name, tags in tagged.items()), next(iter(members)))
        table.add_row(family, str(len(members)), str(len(tagged)), escape(one))
    table.add_row("none that wraps", str(len(found["refused"])), "", "--json has the reasons")
    Console().print(table)

    for name, value in {"tiny": "the embedded one", **found["packages"]}.items():
        print(f"{name}: {value}")
    for each in found["weights"]:
        name = each["name"] or "ARCHITECTURE:PATH"
        print(f"{name}  {each['bytes'] / 1e6:.1f} MB  {each['file']}")
    if not found["weights"]:
        print("no weights in the caches of this machine (~/.cache/clip and the Hugging Face hub's)")
