"""The projected gradients of a data set, kept: new queries then cost no pass over it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._data import Batches
from .._model import Loss, Params, plain_model, select_parameters
from ..solvers.damping import AUTO_DAMPING
from .damping import check_damping
from .fingerprint import of_model
from .gradients import read_data, record, require_finite_rows
from .progress import track
from .projection import KINDS, DenseProjection, FactoredProjection, Projection
from .queries import check_queries, membership
from .row_file import RowFile, map_rows

METHODS = ("factored", "dense")

ROWS_AT_ONCE = 1 << 24
"""How many elements of the features are in work at a time."""

ROUNDING = 10
"""How many times the rounding of its largest entry the damped matrix has to be above zero to be inverted."""

_FEATURES, _SETTINGS = "features.npy", "settings.json"


class ProjectedGradients:
    """Features [N, k] of a data set: every sample's gradient, projected at random; and scores from them.

    With F the features of a block of parameters and F_val those of a query, phi = - F (F^T F / N + damping I)^-1 F_val
    is the influence that the empirical Fisher matrix gives, as far as k random directions show it. Two methods:

    - "factored": every parameter is a block of its own, with features L G R^T for small random L and R. A linear
      layer's inputs and output gradients are projected before they are multiplied, which makes this the cheap one.
    - "dense": one block for all parameters, R g for one random R [dims, P]. Its cost grows with dims times P.

    Args:
        model: any module whose samples are independent (eval mode for BatchNorm and Dropout). It is left unchanged. Its
            parameters may not change as long as scores are wanted.
        data: one batch, (inputs, targets[, teacher_logits]) or a mapping with those keys; or a loader of batches, which
            is gone through once.
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
            TRAK itself has the margin log(p / (1 - p)) of the target here.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.
        method: "factored" or "dense".
        dims: how many numbers to keep, of each parameter (factored) or altogether (dense).
        projection: "normal" or "rademacher", the distribution of the random entries.
        seed: of the projections, which have a generator of their own.
        memory: bytes of R that "dense" may keep; a larger R is made again for every block of samples.
        folder: where to write the features while they are made, as a .npy file that is then memory-mapped; default: in
            memory.
        progress: show progress bars; None shows them for loaders on a terminal only.
        name: what errors call the data.

    Attributes:
        features: [N, k], float32 (float64 for float64 models).

    Raises:
        TypeError, ValueError: arguments that do not fit together; a sample whose loss or gradient is not finite.

    Memory: N x k numbers, unless there is a folder; the projections; a training step's on one batch; blocks of
        per-sample gradients of one layer where they have to be formed. For scores, k_b^2 for the widest block.

    Source: Park et al. 2023, "TRAK" (arXiv 2303.14186), for "dense"; Choe et al. 2024, "What is Your Data Worth to
        GPT?" (LoGra, arXiv 2405.13954), section 3, for "factored".

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(40, 3)
        >>> train = torch.randn(20, 40), torch.randint(0, 3, (20,))
        >>> projected = ProjectedGradients(model, train, dims=24)  # 8 of 40 inputs, for all 3 outputs; and 3 biases
        >>> projected.features.shape
        torch.Size([20, 27])
        >>> val = torch.randn(10, 40), torch.randint(0, 3, (10,))
        >>> projected.scores(val, queries="per_class").shape
        torch.Size([20, 3])
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        loss: Loss | None = None,
        params: Params | None = None,
        method: str = "factored",
        dims: int = 512,
        projection: str = "normal",
        seed: int = 0,
        memory: int = 1 << 29,
        folder: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
        name: str = "data",
    ) -> None:
        chosen, (batches,) = read_data(plain_model(model), params, **{name: data})
        settings = {"method": method, "dims": dims, "projection": projection, "seed": seed}
        self._prepare(model, loss, chosen, settings, memory)
        stream = self._stream(batches, progress)
        if folder is None:
            self.features = torch.cat([features for _, features in stream])
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with RowFile(folder / _FEATURES, self._projection.size, self._projection.dtype) as file:
            for _, features in stream:
                file.append(features)
            (folder / _SETTINGS).unlink(missing_ok=True)  # they belong to the features that are replaced now
        self._write_settings(folder)
        self.features = map_rows(folder / _FEATURES)

    def _prepare(
        self, model: nn.Module, loss: Loss | None, chosen: list[str], settings: dict[str, Any], memory: int
    ) -> None:
        check_projection(settings["method"], settings["dims"], settings["projection"])
        self._model, self._loss, self._chosen, self._settings = plain_model(model), loss, chosen, settings
        parameters = select_parameters(self._model, chosen)
        how = parameters, settings["dims"], settings["projection"], settings["seed"]
        self._projection: Projection
        if settings["method"] == "dense":
            self._projection = DenseProjection(*how, memory)
        else:
            self._projection = FactoredProjection(*how)
        self._settings = {**settings, "parameters": {name: list(p.shape) for name, p in parameters.items()}}
        self._fingerprint = of_model(self._model)

    def _stream(self, batches: Batches, progress: bool | None) -> Iterator[tuple[Any, Tensor]]:
        """Every batch, with its label and its features [n, k]."""
        for label, batch in track(batches, f"projecting {batches.name}", progress):
            recording = record(self._model, batch, self._loss, self._chosen, label)
            features = self._projection.features(recording)
            require_finite_rows(features, label)
            yield (label, batch), features

    @property
    def blocks(self) -> dict[str, slice]:
        """Which features belong together."""
        return self._projection.blocks

    @torch.inference_mode(False)
    def project(
        self, data: Any, queries: str = "per_sample", *, name: str = "data", progress: bool | None = None
    ) -> Tensor:
        """Features of other samples, in the same projection: [K, k], of each sample, or their mean, or means by class.

        Args:
            data: one batch or a loader.
            queries: "per_sample", "mean" or "per_class" (in ascending order of the classes).
            name: what errors call the data.
            progress: show a progress bar; None shows it for a loader on a terminal only.
        """
        check_queries(queries)
        any_order = () if queries == "per_sample" else (name,)
        _, (batches,) = read_data(self._model, self._chosen, any_order=any_order, **{name: data})
        self._require_same_model()
        if queries == "per_sample":
            return torch.cat([features for _, features in self._stream(batches, progress)])
        sums: dict[int, Tensor] = {}
        counts: dict[int, float] = {}
        for (label, batch), features in self._stream(batches, progress):
            classes, members = membership(batch, queries, label, features[:, 0])
            parts = members.to(features.dtype) @ features
            for number, part, count in zip(classes, parts, members.sum(1).tolist(), strict=True):
                sums[number] = sums[number] + part if number in sums else part
                counts[number] = counts.get(number, 0) + count
        return torch.stack([sums[number] / counts[number] for number in sorted(sums)])

    @torch.inference_mode(False)
    def scores(
        self,
        val: Any,
        *,
        queries: str = "mean",
        damping: float | Literal["auto"] = "auto",
        progress: bool | None = None,
    ) -> Tensor:
        """Scores phi of all N samples; phi > 0 means harmful. Costs a pass over `val` and one over the features.

        Args:
            val: the validation samples: one batch or a loader.
            queries: "mean": the mean validation loss; "per_sample": the loss of each validation sample; "per_class":
                the mean loss of the validation samples of each class, in ascending order of the classes.
            damping: added to F^T F / N; "auto" is 0.1 times its mean eigenvalue, in each block.
            progress: show progress bars; None shows them for loaders on a terminal only.

        Returns:
            [N], or [N, K] for K queries.

        Raises:
            ValueError: as the class; damping too small for the matrix to be inverted; a model that has changed.
        """
        check_damping(damping)
        wanted = self.project(val, queries, name="val", progress=progress).double()
        solved = torch.zeros_like(wanted)
        for name, where in self.blocks.items():
            kernel = self._kernels[name]
            mean = float(kernel.diagonal().mean())
            if mean == 0:  # a parameter without gradients
                continue
            lam = AUTO_DAMPING * mean if damping == "auto" else float(damping)
            damped = kernel + lam * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
            factor, failed = torch.linalg.cholesky_ex(damped)
            least = ROUNDING * torch.finfo(self._projection.dtype).eps * float(kernel.diagonal().max())
            if int(failed) or float(factor.diagonal().min()) ** 2 <= least:
                raise ValueError(f"damping is {damping!r}, too little to invert the {len(kernel)} features of {name}")
            solved[:, where] = torch.cholesky_solve(wanted[:, where].T, factor).T
        directions = solved.to(self._projection.dtype)
        phi = torch.cat([-(rows @ directions.T) for rows in self._pieces()])
        return phi[:, 0] if queries == "mean" else phi

    @cached_property
    def _kernels(self) -> dict[str, Tensor]:
        """F^T F / N of every block, in float64."""
        sums: dict[str, Tensor] = {}
        for rows in self._pieces():
            for name, where in self.blocks.items():
                product = (rows[:, where].T @ rows[:, where]).double()
                sums[name] = sums[name] + product if name in sums else product
        return {name: total / len(self.features) for name, total in sums.items()}

    def _pieces(self) -> Iterator[Tensor]:
        """The features, some rows at a time, on the model's device."""
        step = max(1, ROWS_AT_ONCE // self._projection.size)
        for rows in self.features.split(step):
            yield rows.to(self._projection.device)

    def _require_same_model(self) -> None:
        if of_model(self._model) != self._fingerprint:
            raise ValueError("the model is not as it was when the features were made: its parameters have changed")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write features.npy and settings.json to a folder, which is made if it is not there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with RowFile(folder / _FEATURES, self._projection.size, self._projection.dtype) as file:
            for rows in self._pieces():
                file.append(rows)
            (folder / _SETTINGS).unlink(missing_ok=True)
        self._write_settings(folder)

    def _write_settings(self, folder: Path) -> None:
        text = json.dumps({**self._settings, "model": self._fingerprint}, indent=2)
        (folder / _SETTINGS).write_text(text + "\n")

    @classmethod
    @torch.inference_mode(False)
    def load(
        cls, folder: str | os.PathLike[str], model: nn.Module, *, loss: Loss | None = None, memory: int = 1 << 29
    ) -> ProjectedGradients:
        """The features that `save` has written, memory-mapped, for the same model and loss.

        Raises:
            FileNotFoundError: there are none in the folder.
            ValueError: features of another model, or a file that was not written to its end.
        """
        folder = Path(folder)
        if not (folder / _SETTINGS).is_file():
            raise FileNotFoundError(
                f"folder is {str(folder)!r}, which has no {_SETTINGS}: no features were saved there"
            )
        settings = json.loads((folder / _SETTINGS).read_text())
        shapes, saved = settings.pop("parameters"), settings.pop("model")
        own = {name: list(p.shape) for name, p in plain_model(model).named_parameters()}
        different = [name for name, shape in shapes.items() if own.get(name) != shape]
        if different:
            raise ValueError(
                f"the features in {str(folder)!r} are of a model with {different[0]} {shapes[different[0]]}"
            )
        loaded = cls.__new__(cls)
        loaded._prepare(model, loss, list(shapes), settings, memory)
        loaded._fingerprint = saved
        loaded._require_same_model()
        loaded.features = map_rows(folder / _FEATURES)
        return loaded


def check_projection(method: Any, dims: Any, projection: Any) -> None:
    """Raise unless these are what they should be."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(map(repr, METHODS))}")
    if not isinstance(projection, str) or projection not in KINDS:
        raise ValueError(f"projection is {projection!r}, expected one of {', '.join(map(repr, KINDS))}")
    if isinstance(dims, bool) or not isinstance(dims, int):
        raise TypeError(f"dims is {dims!r}, expected an int >= 1")
    if dims < 1:
        raise ValueError(f"dims is {dims!r}, expected at least 1")
