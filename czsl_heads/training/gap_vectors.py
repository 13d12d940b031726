"""The modality gap of a test split, by which vector stands for an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from czsl_heads.functional.unit import unit_vectors
from czsl_heads.metrics.modality_gap import RelativeModalityGap
from czsl_heads.models.gap import winning_tokens


@dataclass
class GapVectors:
    """The modality gap of the closed world, by which vector stands for an image, and how often that is a patch.

    ``cls``: token 0; ``pred``: the token that wins the pair that the method predicts; ``true``: the one that wins the
    labelled pair, an oracle; ``vac``: the condenser's vector. Texts are those before anything draws them to an image.
    """

    gaps: dict[str, RelativeModalityGap]
    include_cls: bool = True
    counts: dict[str, float] = field(default_factory=lambda: {"images": 0, "pred": 0, "true": 0, "strong": 0})

    def look(
        self, tokens: Tensor, features: Tensor | None, predicted: Tensor, true: Tensor, texts: Tensor
    ) -> list[Tensor]:
        """What :meth:`add` takes of images, each tensor with a row for each: processes can send it to others."""
        tokens, texts = unit_vectors(tokens, torch.float32), texts.float()
        of_predicted, first = winning_tokens(tokens, texts[predicted], include_cls=self.include_cls)
        of_true, second = winning_tokens(tokens, texts[true], include_cls=self.include_cls)
        vectors = [tokens[:, 0], of_predicted, of_true]
        if features is not None:
            vectors.append(features)

        cosines = (tokens[:, 1:] @ texts[predicted][:, :, None]).squeeze(2)  # [batch, patches]
        middle = (cosines.amax(dim=1, keepdim=True) + cosines.amin(dim=1, keepdim=True)) / 2
        strong = (cosines > middle).float().mean(dim=1)
        return [true.cpu(), first.cpu(), second.cpu(), strong.cpu(), *(each.cpu() for each in vectors)]

    def add(self, looked: Sequence[Tensor]) -> None:
        """Add images that were looked at."""
        true, of_predicted, of_true, strong, *vectors = looked
        self.counts["pred"] += int((of_predicted > 0).sum())
        self.counts["true"] += int((of_true > 0).sum())
        for gap, images in zip(self.gaps.values(), vectors):
            gap.update(images, true)
        self.counts["strong"] += float(strong.sum())
        self.counts["images"] += len(true)

    def as_dict(self) -> dict[str, dict[str, float]]:
        shares = {name: count / self.counts["images"] for name, count in self.counts.items() if name != "images"}
        return {
            "relative_modality_gap": {name: gap.compute().item() for name, gap in self.gaps.items()},
            "winners_that_are_patches": {name: shares[name] for name in ("pred", "true")},
            "patches_above_the_middle": {"pred": shares["strong"]},
        }
