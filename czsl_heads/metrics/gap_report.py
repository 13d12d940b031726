"""All that is measured of the gap between images and texts, in one call, and a picture of both in one plane."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from czsl_heads._files import save_figure
from czsl_heads.functional.gap import instance_distance, modality_distance, relative_modality_gap
from czsl_heads.functional.gap_losses import alignment_loss, contrastive_loss
from czsl_heads.functional.spectrum import effective_rank, explained_variance
from czsl_heads.functional.uniformity import check_matched, cross_uniformity_loss, uniformity_loss
from czsl_heads.functional.unit import wide_unit_rows
from czsl_heads.metrics.gathered import SafeMetric, ScalarTensors
from czsl_heads.metrics.separability import linear_separability

_DRAWN = 2000  # images in the picture, at most


@dataclass(frozen=True)
class GapReport:
    """What :func:`gap_report` found.

    Attributes:
        numbers: By name; docs/modality_gap.md has a line on each.
        explained_variance: Of ``"images"`` and ``"texts"``: the share of the variance by principal component.
        plane: Of ``"images"`` and ``"texts"``: places ``[vectors, 2]`` in the plane of both.
        labels: The text of each image, ``[images]``.
        plane_share: Of the variance of both modalities, what the two axes of the plane hold.
    """

    numbers: dict[str, float]
    explained_variance: dict[str, list[float]]
    plane: dict[str, Tensor]
    labels: Tensor
    plane_share: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """Numbers and shares as plain values, without the places."""
        spread = {name: [round(share, 6) for share in shares] for name, shares in self.explained_variance.items()}
        return {**self.numbers, "explained_variance": spread, "plane_share": list(self.plane_share)}

    def plot(self, path: str | PathLike[str] | IO[bytes], *, title: str = "") -> None:
        """Draw the plane, and beside it what the components explain, to an image file; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        plane, spread = figure.subplots(1, 2, width_ratios=(3, 2))
        self._draw_plane(plane)
        for name, shares in self.explained_variance.items():
            summed = torch.tensor(shares).cumsum(dim=0)
            spread.plot(range(1, len(shares) + 1), 100 * summed, color=_COLORS[name], label=name)
        spread.set(xlabel="principal components", ylabel="variance explained (%)", ylim=(0, 102), xscale="log")
        spread.grid(alpha=0.3)
        spread.legend(frameon=False, loc="lower right")
        figure.suptitle(title, fontsize=10)
        save_figure(figure, Path(path) if isinstance(path, (str, PathLike)) else path, dpi=130)

    def _draw_plane(self, axis: Any) -> None:
        drawn = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))[:_DRAWN]
        images, texts = self.plane["images"][drawn].cpu(), self.plane["texts"].cpu()
        matched = texts[self.labels.cpu()[drawn]]
        few = slice(0, 60)  # lines between matched pairs; more would be a blot
        lines = torch.stack([images[few], matched[few]])  # [2, pairs, 2]
        axis.plot(lines[:, :, 0], lines[:, :, 1], color="0.6", linewidth=0.5, alpha=0.6, zorder=1)
        axis.scatter(*images.T, s=8, color=_COLORS["images"], alpha=0.4, linewidths=0, label="images", zorder=2)
        axis.scatter(*texts.T, s=14, color=_COLORS["texts"], marker="^", linewidths=0, label="texts", zorder=3)
        shares = [f"{100 * share:.0f} %" for share in self.plane_share]
        axis.set(xlabel=f"1st shared component ({shares[0]})", ylabel=f"2nd shared component ({shares[1]})")
        axis.set_aspect("equal", adjustable="datalim")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="upper right")


_COLORS = {"images": "#1f77b4", "texts": "#d62728"}


def gap_report(images: Tensor, texts: Tensor, labels: Tensor | None = None, *, seed: int = 0) -> GapReport:
    """All metrics of the gap between images and texts, in double precision.

    Args:
        images: ``[images, dim]``; any norm but zero.
        texts: ``[texts, dim]``; any norm but zero. Without ``labels``, row i is the text of image i.
        labels: Which text belongs to each image, long ``[images]``: texts are then one a class.
        seed: Draws the split of :func:`linear_separability`.

    Returns:
        Numbers by name, what the principal components of both explain, and the places of all vectors in the plane of
        the two shared components; ``plot(path)`` draws it.

    Raises:
        TypeError: An input is of another kind.
        ValueError: A shape does not fit, a label is out of range, a vector is zero or not finite, or there are fewer
            than two images or texts.
        ModuleNotFoundError: There is no scikit-learn (``pip install 'czsl-heads[train]'``).

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> images, texts = torch.randn(50, 8, generator=generator), torch.randn(5, 8, generator=generator)
        >>> report = gap_report(images, texts, torch.arange(50) % 5)
        >>> sorted(report.numbers)[:4]
        ['alignment', 'centroid_cosine', 'centroid_distance', 'contrastive']
    """
    labels = check_matched(images, texts, labels)
    of_pairs = len(labels) == len(texts) and bool((labels == torch.arange(len(texts), device=labels.device)).all())
    images, texts = (wide_unit_rows(*named).detach() for named in (("images", images), ("texts", texts)))
    matching: dict[str, Any] = {} if of_pairs else {"labels": labels}
    separable = linear_separability(images, texts, labels=labels, seed=seed)  # first: it refuses what is not finite

    relative = relative_modality_gap(images, texts, **matching)
    matched = texts[labels]
    uniformity = {"images": uniformity_loss(images), "texts": uniformity_loss(texts)}
    mean_uniformity = (uniformity["images"] + uniformity["texts"]) / 2
    crossed = cross_uniformity_loss(images, texts, **matching)
    aligned, contrastive = alignment_loss(images, matched), contrastive_loss(images, texts, **matching)
    closing = contrastive + mean_uniformity + aligned
    found = {
        "relative_modality_gap": relative,
        "l2m": modality_distance(images, texts, **matching),
        "l2i": instance_distance(images, matched),
        "centroid_distance": modality_distance(images, matched),
        "centroid_cosine": torch.cosine_similarity(images.mean(dim=0), matched.mean(dim=0), dim=0),
        "matched_cosine": (images * matched).sum(dim=1).mean(),
        "alignment": aligned,
        "uniformity": mean_uniformity,
        "uniformity_images": uniformity["images"],
        "uniformity_texts": uniformity["texts"],
        "cross_uniformity": crossed,
        "contrastive": contrastive,
        "cua": closing,
        "cuaxu": closing + crossed,
        "effective_rank_images": effective_rank(images),
        "effective_rank_texts": effective_rank(texts),
    }
    numbers = {name: value.item() for name, value in found.items()} | {"linear_separability": separable}
    spread = {"images": explained_variance(images).tolist(), "texts": explained_variance(texts).tolist()}
    places, shares = _shared_plane(images, texts)
    return GapReport(numbers, spread, places, labels, shares)


def _shared_plane(images: Tensor, texts: Tensor) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Places in the plane in which both vary most, and the share of either axis; both modalities weigh the same."""
    middle = (images.mean(dim=0) + texts.mean(dim=0)) / 2
    centred = {"images": images - middle, "texts": texts - middle}
    covariance = torch.stack([vectors.T @ vectors / len(vectors) for vectors in centred.values()]).mean(dim=0)
    values, axes = torch.linalg.eigh(covariance)  # ascending
    # The direction of an axis is arbitrary: texts stand to the right, and the largest entry of the other is positive.
    first, second = axes[:, -1], axes[:, -2]
    first = first * (1.0 if (centred["texts"].mean(dim=0) @ first) >= 0 else -1.0)
    second = second * second[second.abs().argmax()].sign()
    plane = torch.stack([first, second], dim=1)  # [dim, 2]
    total = values.sum().item() or 1.0
    places = {name: vectors @ plane for name, vectors in centred.items()}
    return places, (values[-1].item() / total, values[-2].item() / total)


class ModalityGap(SafeMetric):
    """Every number of :func:`gap_report`, gathered batch by batch and over processes; it keeps the vectors.

    For the relative modality gap alone, :class:`RelativeModalityGap` keeps sums.

    Args:
        texts: One text a class, ``[texts, dim]``, any norm but zero: ``update`` then takes labels (class mode). Without
            it, ``update`` takes the text of each image (pair mode).
        seed: Of :func:`gap_report`.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: As :func:`gap_report`, in ``update`` or ``compute``.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> images, texts = torch.randn(50, 8, generator=generator), torch.randn(5, 8, generator=generator)
        >>> gap, labels = ModalityGap(texts), torch.arange(50) % 5
        >>> gap.update(images[:20], labels[:20])
        >>> gap.update(images[20:], labels[20:])
        >>> gap.compute()["l2m"].item() == gap_report(images, texts, labels).numbers["l2m"]
        True
    """

    texts: Tensor | None
    images: list[Tensor] | Tensor
    matches: list[Tensor] | Tensor

    def __init__(self, texts: Tensor | None = None, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if texts is not None:
            wide_unit_rows("texts", texts)
            texts = texts.detach().clone()
        self.seed = seed
        self.register_buffer("texts", texts, persistent=False)
        for name in ("images", "matches"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self._keep_apart(texts)

    def update(self, images: Tensor, match: Tensor) -> None:
        """Add samples; there may be none.

        Args:
            images: ``[images, dim]``, any norm but zero.
            match: In class mode labels, long ``[images]``; in pair mode texts ``[images, dim]``.
        """
        if self.texts is None:
            check_matched(images, match, None)
        else:
            check_matched(images, self.texts, match)
        for state, value in ((self.images, images), (self.matches, match)):
            assert isinstance(state, list)
            state.append(value.detach())

    def report(self) -> GapReport:
        """The whole report of this process's samples, with its picture."""
        images, matches = (_joined(state) for state in (self.images, self.matches))
        if self.texts is None:
            return gap_report(images, matches, seed=self.seed)
        return gap_report(images, self.texts, matches, seed=self.seed)

    def compute(self) -> dict[str, Tensor]:
        """The numbers of all samples so far, as scalar tensors by name."""
        found = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.report().numbers.items()}
        return ScalarTensors(found)


def _joined(state: list[Tensor] | Tensor) -> Tensor:
    if isinstance(state, Tensor):
        return state
    if not state:
        raise ValueError("expected at least two images and texts, got none")
    return torch.cat(state)
