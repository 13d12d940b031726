"""The relative modality gap as a torchmetrics metric whose states do not grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from czsl_heads._checks import check_kind, check_shapes, check_tensor
from czsl_heads.functional.gap import GapSums, gap_of_sums, gather_sums
from czsl_heads.functional.unit import wide_unit_rows
from czsl_heads.metrics.gathered import SafeMetric


class RelativeModalityGap(SafeMetric):
    """The gap between images and texts, gathered batch by batch.

    The class around :func:`czsl_heads.functional.relative_modality_gap`. It keeps sums, whatever the number of samples,
    and they add up across processes. ``metric(images, match)`` also returns the gap of that batch alone, NaN where it
    holds fewer than two images or texts.

    Args:
        texts: One text a class, ``[texts, dim]``, any norm but zero: ``update`` then takes labels (class mode). Without
            it, ``update`` takes the text of each image (pair mode).
        include_self: Whether a vector also makes a pair with itself.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: A tensor is of the wrong kind.
        ValueError: A shape does not fit, a label is out of range, or a vector is zero; in ``compute``, there are fewer
            than two images or texts (one, with ``include_self``).

    Example:
        >>> images, texts = torch.eye(3), torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
        >>> gap = RelativeModalityGap(texts)
        >>> gap.update(images[:1], torch.tensor([0]))
        >>> gap.update(images[1:], torch.tensor([0, 1]))
        >>> gap.compute()
        tensor(0.2808, dtype=torch.float64)

    References:
        Schrodi et al., Two Effects, One Trigger, ICLR 2025. Zhang et al., SAM, CVPR 2026 (SAC), Fig. 2.
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    texts: Tensor | None
    image_sum: Tensor
    text_sum: Tensor
    matched_sum: Tensor
    num_images: Tensor
    num_texts: Tensor

    def __init__(self, texts: Tensor | None = None, *, include_self: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_kind("include_self", include_self, bool)
        if texts is not None:
            check_tensor("texts", texts)
            check_shapes(texts=(texts, "texts dim"))
            wide_unit_rows("texts", texts)  # a zero vector is told here, not after the first epoch
            texts = texts.detach().clone()
        self.include_self = include_self
        self.register_buffer("texts", texts, persistent=False)
        # Class texts are at hand in full: only what comes with the samples is summed.
        of_samples = ("image_sum", "matched_sum", "num_images") if texts is not None else GapSums._fields
        for name in of_samples:
            count = name.startswith("num_")
            # A scalar zero: the first batch gives it the dim, and the float64 that not every device has.
            self.add_state(name, torch.zeros((), dtype=torch.long if count else torch.float32), dist_reduce_fx="sum")
        self._keep_apart(texts)

    def update(self, images: Tensor, match: Tensor) -> None:
        """Add samples; there may be none.

        Args:
            images: ``[images, dim]``, any norm but zero.
            match: In class mode labels, long ``[images]``; in pair mode texts ``[images, dim]``.
        """
        check_tensor("images", images)
        check_shapes(images=(images, f"images {self._dim()}"))
        if self.texts is None:
            self._add(gather_sums(images, match, texts_name="match"))
        else:
            self._add(gather_sums(images, self.texts, match, labels_name="match"))

    def _dim(self) -> int | str:
        """That of the texts or of earlier images, else a name that fits any."""
        if self.texts is not None:
            return self.texts.shape[1]
        image_sum = self.image_sum if self._earlier is None else self._earlier["image_sum"]
        return len(image_sum) if image_sum.ndim else "dim"

    def _add(self, sums: GapSums) -> None:
        for name, value in sums._asdict().items():
            if name in self._defaults:
                setattr(self, name, getattr(self, name) + value)

    def compute(self) -> Tensor:
        """The gap of all samples so far, a scalar."""
        sums = {name: getattr(self, name) for name in GapSums._fields if name in self._defaults}
        if self.texts is not None:
            sums.update(text_sum=wide_unit_rows("texts", self.texts).sum(dim=0), num_texts=len(self.texts))
        try:
            return gap_of_sums(GapSums(**sums), include_self=self.include_self)
        except ValueError:  # too few samples
            if self._earlier is None:
                raise
            return self.matched_sum.new_full((), torch.nan)

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        distributed_available: Callable[..., Any] | None = None,
    ) -> None:
        """Gather the sums of all processes, as in torchmetrics; a process may have none."""
        if should_sync and torch.distributed.is_available() and torch.distributed.is_initialized():
            own = torch.tensor(len(self.image_sum) if self.num_images else 0, device=self.device)
            dim = int(max(gather_all_tensors(own, process_group or self.process_group)))
            # Adds nothing, but gives a process without samples states of the shape that the others have.
            nothing = torch.zeros(0, dim, device=self.device)
            self._add(gather_sums(nothing, nothing))
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)
