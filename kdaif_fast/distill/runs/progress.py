"""The progress bar of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from ..._progress import bar

BAR = "{desc} |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class TrainingProgress:
    """One bar over all steps of a run, with what was measured last; a context manager.

    Args:
        epochs: how many the run has.
        steps: of an epoch; None if that is not known, then the bar counts without an end.
        progress: whether to show it; None shows it on a terminal only.
        done: steps that a run which is gone on with has behind it.

    Example:
        >>> with TrainingProgress(epochs=2, steps=10, progress=False) as bar:
        ...     bar.step()
        ...     bar.show(accuracy=0.941, mean_weight=0.98, share_below_1=0.12, seconds={"student": 1.5})
        ...     print(bar.text)
        accuracy 94.1 %, mean w 0.980, w < 1: 12.0 %, student 1.5 s
    """

    def __init__(self, epochs: int, steps: int | None, progress: bool | None = None, done: int = 0) -> None:
        self._epochs, self._steps = epochs, steps
        self.text = ""
        self._bar = bar(
            progress,
            total=None if steps is None else epochs * steps,
            initial=done,
            desc=self._description(done),
            unit="step",
            dynamic_ncols=True,
            bar_format=None if steps is None else BAR,
        )

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, n: int = 1) -> None:
        """So many more steps are done."""
        if not self._bar.disable:
            self._bar.set_description_str(self._description(self._bar.n + n), refresh=False)
        self._bar.update(n)

    def show(
        self,
        *,
        accuracy: float | None = None,
        mean_weight: float | None = None,
        share_below_1: float | None = None,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Show the validation accuracy, the weights' mean and share below 1, and the seconds that parts took.

        What is None is not shown; the rest stays until it is shown anew. Plain numbers: a tensor on a GPU would have
        the loop wait for it.
        """
        parts = []
        if accuracy is not None:
            parts.append(f"accuracy {100 * accuracy:.1f} %")
        if mean_weight is not None:
            parts.append(f"mean w {mean_weight:.3f}")
        if share_below_1 is not None:
            parts.append(f"w < 1: {100 * share_below_1:.1f} %")
        parts += [f"{part} {second:.1f} s" for part, second in (seconds or {}).items()]
        self.text = ", ".join(parts)
        self._bar.set_postfix_str(self.text)

    def _description(self, done: int) -> str:
        if not self._steps:
            return "training"
        epoch = min(max(done - 1, 0) // self._steps + 1, self._epochs)
        return f"epoch {epoch}/{self._epochs}"
