"""What is wrong with the values of an update of the memory bank, found without waiting for a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from czsl_heads.functional.precision import score_dtype


class Found(NamedTuple):
    """What :meth:`UpdateCheck.look` finds.

    Attributes:
        finite: Which rows of the predictions are finite, bool ``[batch]``.
        good: Whether the batch has no fault, bool scalar.
    """

    finite: Tensor
    good: Tensor


class UpdateCheck:
    """Keeps the first fault of the updates until somebody waits for the device anyway; on a CPU it tells at once."""

    def __init__(self, num_pairs: int) -> None:
        self.num_pairs = num_pairs
        # The first row with a fault: its kind (1: a label, 2: a prediction), its number, and two values.
        self.fault: Tensor | None = None

    def look(self, probs: Tensor, rows: Tensor, device: torch.device) -> Found:
        """Look at predictions ``[batch, pairs]`` and the rows ``[batch]`` that they go to.

        Raises:
            ValueError: There is a fault, if it can be seen without waiting for a GPU.
        """
        total, low = probs.sum(dim=1, dtype=score_dtype(probs)), probs.amin(dim=1)
        finite, outside = total.isfinite(), (rows < 0) | (rows >= self.num_pairs)
        wrong = finite & ((low < 0) | ((total - 1).abs() > 0.01))
        kind = torch.where(outside, 1, torch.where(wrong, 2, 0))

        number = torch.arange(len(rows), device=rows.device)
        each = torch.stack([kind.double(), number, torch.where(outside, rows, total), low], dim=1)  # [batch, 4]
        fault = each.new_zeros(4)
        if len(each) > 0:
            fault = each[(kind > 0).long().argmax(dim=0, keepdim=True)][0]

        self._keep(fault.to(device))
        if "cpu" in (fault.device.type, device.type):
            self.tell()
        return Found(finite, fault[0] == 0)

    def _keep(self, fault: Tensor) -> None:
        self.fault = fault if self.fault is None else torch.where(self.fault[0] > 0, self.fault, fault)

    def tell(self) -> None:
        """Wait for the device and raise the ValueError of an update since the last time, if there is one."""
        fault, self.fault = self.fault, None
        if fault is None:
            return
        kind, row, value, low = fault.tolist()
        before = "" if fault.device.type == "cpu" else " (in this or an earlier update)"
        if kind == 1:
            raise ValueError(f"expected `pair_index` to be in [0, {self.num_pairs - 1}], got {value:.0f}{before}")
        if kind == 2:
            raise ValueError(
                f"expected `probs` of rows that sum to 1 and have no negative value, "
                f"got a sum of {value:.4g} and a smallest value of {low:.4g} in row {row:.0f}{before}"
            )

    def forget(self) -> None:
        """Drop a fault that was not told."""
        self.fault = None

    def to(self, device: torch.device) -> None:
        """Move the fault that was not told yet."""
        if self.fault is not None:
            self.fault = self.fault.to(device)
