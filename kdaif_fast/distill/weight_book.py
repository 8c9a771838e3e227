"""The weight of every sample, from one measurement to the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COMBINATIONS = ("mean", "product", "ema")


def check_averaging(combine: Any, ema: Any) -> None:
    """ValueError for a combination or a share that is none."""
    if combine is not None and combine not in COMBINATIONS:
        raise ValueError(f"combine is {combine!r}, expected None or one of {', '.join(COMBINATIONS)}")
    if isinstance(ema, bool) or not isinstance(ema, (int, float)) or not 0 <= ema < 1:
        raise ValueError(f"ema is {ema!r}, expected a number in [0, 1): the share that old weights keep")


class WeightBook:
    """Weights of N samples, 1 until they are measured, kept on one device.

    A measured weight is combined with the one measured before, if `combine` says how; the result is averaged with what
    was in the book, if `ema` is not 0; what is read is divided by the mean, if `normalize`.

    Args:
        samples: N.
        device: where they are kept.
        combine: None; "mean" or "product" of the last two measurements; "ema": half the new one and half what all
            earlier ones gave together (mechanism M4).
        ema: the share that the old weight keeps at a new measurement, in [0, 1).
        normalize: whether weights are divided by their mean over all samples that were ever measured, as it was at
            `settle`.
    """

    def __init__(
        self,
        samples: int,
        device: torch.device,
        *,
        combine: str | None = None,
        ema: float = 0.0,
        normalize: bool = False,
    ) -> None:
        check_averaging(combine, ema)
        self.combine, self.ema, self.normalize = combine, float(ema), normalize
        self._measured = torch.ones(samples, device=device)
        self._combined = torch.ones(samples, device=device)
        self._weights = torch.ones(samples, device=device)
        self._seen = torch.zeros(samples, dtype=torch.bool, device=device)
        self._factor = torch.ones((), device=device)
        self._touched = torch.zeros(samples, dtype=torch.bool, device=device)

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._weights.device

    def read(self, indices: Tensor | None = None) -> Tensor:
        """The weights of these samples, or of all; a copy."""
        weights = self._weights.clone() if indices is None else self._weights[indices]
        return weights * self._factor if self.normalize else weights

    def record(self, indices: Tensor, measured: Tensor) -> Tensor:
        """Take new measurements of these samples in; the weights that they have from now on.

        Measurements that are no weights (negative or not finite) are given back as they are, and leave the book alone.
        """
        measured = measured.detach().to(self._weights)
        seen = self._seen[indices]
        now = torch.where(seen, self._combine(indices, measured), measured)
        averaged = torch.where(seen, self.ema * self._weights[indices] + (1 - self.ema) * now, now)
        usable = (measured >= 0) & measured.isfinite()
        found = torch.where(usable, averaged, measured)
        found = found * self._factor if self.normalize else found
        changes = [(self._seen, seen | usable), (self._touched, self._touched[indices] | usable)]
        for values, new in ((self._measured, measured), (self._combined, now), (self._weights, averaged)):
            changes.append((values, torch.where(usable, new, values[indices])))
        for values, new in changes:  # once all of it is there: memory may run out before, not in between
            values[indices] = new
        return found

    def forget(self, indices: Tensor) -> None:
        """Put weight 1 in for these samples, as if they had never been measured."""
        for values in (self._measured, self._combined, self._weights):
            values[indices] = 1.0
        self._seen[indices] = False

    def settle(self) -> None:
        """Take the mean that weights are divided by from the book as it is now."""
        seen = self._seen.to(self._weights)
        mean = (self._weights * seen).sum() / seen.sum()
        # Weights that are all 0, or none measured: there is nothing to divide by.
        self._factor = torch.where(mean > 0, 1 / mean, torch.ones_like(mean))

    def take_changes(self) -> dict[str, Tensor]:
        """What was recorded since this was last called, on the CPU: for the books of other processes."""
        indices = self._touched.nonzero()[:, 0]
        self._touched.zero_()
        changes = {name: getattr(self, f"_{name}")[indices].cpu() for name in ("measured", "combined", "weights")}
        return {"indices": indices.cpu(), **changes}

    def merge(self, changes: dict[str, Tensor]) -> None:
        """Take over what another process has recorded."""
        indices = changes["indices"].to(self.device)
        for name in ("measured", "combined", "weights"):
            getattr(self, f"_{name}")[indices] = changes[name].to(self.device)
        self._seen[indices] = True

    def _combine(self, indices: Tensor, measured: Tensor) -> Tensor:
        if self.combine is None:
            return measured
        if self.combine == "product":
            return measured * self._measured[indices]
        return (measured + (self._measured if self.combine == "mean" else self._combined)[indices]) / 2

    def state_dict(self) -> dict[str, Any]:
        """All that is in the book: tensors."""
        return {
            "measured": self._measured,
            "combined": self._combined,
            "weights": self._weights,
            "seen": self._seen,
            "touched": self._touched,
            "factor": self._factor,
        }

    def require_fitting(self, state: dict[str, Any]) -> None:
        """ValueError if the state is of another number of samples."""
        found = len(state["weights"])
        if found != len(self):
            raise ValueError(f"the weights are of {found} samples, expected {len(self)}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another book of as many samples held; ValueError for another number."""
        self.require_fitting(state)
        for name in ("measured", "combined", "weights", "seen", "touched", "factor"):
            mine = getattr(self, f"_{name}")
            setattr(self, f"_{name}", state[name].to(mine).clone())
