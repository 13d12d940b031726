"""The open world without pairs that cannot be: their feasibility, and the threshold below which scores are masked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from czsl_heads._sealed import DamagedError
from czsl_heads.data.feasibility_files import read_feasibility, read_word_vectors
from czsl_heads.encoders.wrap import wrap
from czsl_heads.functional.feasibility import FeasibilityCurve, Masking, feasibility, mask_infeasible
from czsl_heads.metrics.feasibility_search import FeasibilitySearch
from czsl_heads.models.saved import read_tensors, write_tensors
from czsl_heads.prompts.primitives import encode_primitives
from czsl_heads.space import CompositionSpace
from czsl_heads.training.config import Config

FEASIBILITY = "feasibility.safetensors"


@dataclass(frozen=True)
class OpenWorld:
    """How feasible every attribute with every object is, ``[A, O]``, and what masking makes of the infeasible."""

    feasibility: Tensor
    masking: Masking = "clean"


class Thresholds:
    """The threshold of each readout, searched on validation images, and the scores of other images masked at it.

    ``searches`` has the search of each readout, which validation images are added to.

    Args:
        open_world: Feasibility, and the way of masking.
        space: The open world.
        readouts: Names of the readouts.
    """

    def __init__(self, open_world: OpenWorld, space: CompositionSpace, readouts: Iterable[str]) -> None:
        attr, obj = space.pairs.unbind(dim=1)
        self.space, self.masking = space, open_world.masking
        self.feasibility = open_world.feasibility[attr, obj]
        self.searches = {
            name: FeasibilitySearch(space, self.feasibility, masking=self.masking, sync_on_compute=False)
            for name in readouts
        }

    @cached_property
    def curves(self) -> dict[str, FeasibilityCurve]:
        """What the search found for each readout; call it when all validation images were added."""
        return {name: search.result() for name, search in self.searches.items()}

    def masked(self, name: str, scores: Tensor, first: int = 0) -> Tensor:
        """Scores of other images by one readout, of the columns from ``first`` on, masked at its threshold."""
        own = slice(first, first + scores.shape[1])
        ratings, seen = self.feasibility[own], self.space.seen_mask[own]
        return mask_infeasible(scores, ratings, seen, self.curves[name].threshold, masking=self.masking)

    def as_dicts(self) -> dict[str, Any]:
        """For a JSON file, by readout: the curve, its threshold, and how many unseen pairs of all that keeps."""
        unseen = self.feasibility[~self.space.seen_mask]
        return {
            name: {
                **curve.as_dict(),
                "kept_pairs": int((unseen >= curve.threshold).sum()),
                "unseen_pairs": len(unseen),
            }
            for name, curve in self.curves.items()
        }


def feasibility_table(config: Config, space: CompositionSpace) -> Tensor:
    """Feasibility ``[A, O]`` from what the configuration names: a tensor (``.pt``), a text file, or the encoder.

    Raises:
        ValueError: A file is missing or broken, or of another space.
    """
    if config.feasibility.endswith(".pt"):
        return read_feasibility(config.feasibility, space)
    if config.feasibility == "encoder":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        vectors = encode_primitives(wrap(config.encoder).to(device), space)
    else:
        vectors = read_word_vectors(config.feasibility, space)
    attr, obj = space.pairs[space.seen_mask].unbind(dim=1)
    seen = torch.zeros(len(space.attributes), len(space.objects), dtype=torch.bool)
    seen[attr, obj] = True
    attr_vectors, obj_vectors = (rows.float().cpu() for rows in vectors)
    return feasibility(attr_vectors, obj_vectors, seen)


def keep_feasibility(out: Path, table: Tensor) -> None:
    """Write the table into the folder of an ablation, where all its runs find it, also when they are resumed."""
    write_tensors(out / FEASIBILITY, {"feasibility": table.contiguous()})


def table_sha256(table: Tensor) -> str:
    """SHA-256 of the file that :func:`keep_feasibility` writes."""
    return hashlib.sha256(save({"feasibility": table.contiguous()})).hexdigest()


def kept_open_world(out: Path, config: Config) -> OpenWorld | None:
    """What the folder of an ablation holds of the open world; None for an ablation without.

    Raises:
        ValueError: The file is damaged.
    """
    if config.world == "closed":
        return None
    table = read_tensors(out / FEASIBILITY).get("feasibility")
    if table is None:
        raise DamagedError(f"expected the feasibility of pairs in {out / FEASIBILITY}, got other tensors")
    return OpenWorld(table, config.masking)
