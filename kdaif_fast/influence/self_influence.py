"""Self-influence: how much each sample's own loss depends on the sample being in the training set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._model import Loss, Params, plain_model
from .._tree import product_dtype
from .._warn import warn_user
from ..curvature import CURVATURES, make_curvature
from ..per_sample.recording import Recording
from ..solvers import ConvergenceWarning, auto_damping, cg, check_limits
from .damping import check_damping
from .gradients import KeptGradients, read_data, record, require_finite_rows, squared_norms
from .progress import track

SOLVERS = ("cg", "exact")

VECTORS = 8
"""How many vectors [P] a right-hand side takes in the solve: itself, the solution, and the solver's own."""


@torch.inference_mode(False)
def self_influence(
    model: nn.Module,
    data: Any,
    *,
    train: Any = None,
    loss: Loss | None = None,
    params: Params | None = None,
    curvature: Any = "identity",
    solver: str = "cg",
    damping: float | Literal["auto"] = "auto",
    tol: float | None = 1e-3,
    max_iter: int = 500,
    memory: int = 1 << 28,
    progress: bool | None = None,
) -> Tensor:
    """Self-influence of every sample: g_i^T (C + damping I)^-1 g_i, with g_i the gradient of its own loss.

    Never negative (unless C + damping I has negative eigenvalues), other than the phi of all other calls: it is n times
    how much faster the sample's loss would grow if it counted less in training, -phi_i with the sample itself as the
    validation set. Large for samples that the model had to memorise: wrong labels, and rare but right ones.

    Args:
        model: any module whose samples are independent (eval mode for BatchNorm and Dropout). It is left unchanged.
        data: the samples: one batch, (inputs, targets[, teacher_logits]) or a mapping with those keys; or a loader of
            batches, which is gone through once.
        train: the samples that C is of, in the same forms; default `data`. A loader is gone through once a product.
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.
        curvature: C: "identity", for which no gradient is formed; the name of another curvature, "ggn" for example; or
            an operator: an object over the same parameters with `.solve(b, damping)`, as EKFAC has it, or `.matmat`.
            Without a `.solve`, every sample is a right-hand side of the solver.
        solver: "cg", conjugate gradients; or "exact", for up to 20,000 parameters: C as a matrix, factored once;
            cheaper where there are fewer parameters than samples times iterations of cg.
        damping: added to every eigenvalue of C; "auto" is that of `solve`: 0.1 times the mean eigenvalue
            of C (0 for "identity").
        tol: the relative residual at which cg stops; None spends exactly max_iter products.
        max_iter: the most products that cg spends on a block of samples.
        memory: bytes for the samples that are solved for together, with what conjugate gradients need.
        progress: show a progress bar; None shows it for a loader on a terminal only.

    Returns:
        [N], float32 (float64 for float64 models), on the model's device.

    Raises:
        TypeError, ValueError: arguments that do not fit together; a sample whose loss or gradient is not finite.

    Warns:
        ConvergenceWarning: for how many samples the solve did not reach `tol`, and by how much.

    Memory: `memory`, the operator's (for "exact" two matrices [P, P]), and a training step's on one batch, with the
        inputs and output gradients of all layers; for "identity" that of per_sample_grad_norms.

    Source: Koh and Liang 2017 (arXiv 1703.04730), section 5.3; Feldman and Zhang 2020 (arXiv 2008.03703) for what large
        values mean.

    Example:
        >>> import torch, kdaif_fast
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
        >>> torch.nn.init.zeros_(model.weight).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
        >>> kdaif_fast.self_influence(model, batch)
        tensor([0.5000, 2.0000])
    """
    check_damping(damping)
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, expected one of {', '.join(map(repr, SOLVERS))}")
    check_limits("self_influence", 0.0, tol, max_iter)
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ValueError(f"memory is {memory!r}, expected a positive number of bytes")
    plain = plain_model(model)
    chosen, (batches,) = read_data(plain, params, data=data)
    is_identity = isinstance(curvature, str) and curvature == "identity"
    solve = (
        None
        if is_identity
        else _Solve(_operator(curvature, plain, data, train, loss, chosen), solver, damping, tol, max_iter)
    )
    pieces = []
    for label, batch in track(batches, "self-influence", progress):
        recording = record(plain, batch, loss, chosen, label)
        if solve is None:
            squares = torch.stack(list(squared_norms(recording).values())).sum(0)
            own = squares / (1 + (0.0 if damping == "auto" else float(damping)))
        else:
            own = _by_blocks(recording, solve, memory, label)
        require_finite_rows(own, label, "self-influence")
        pieces.append(own)
    if solve is not None:
        solve.warn()
    return torch.cat(pieces)


def _by_blocks(recording: Recording, solve: _Solve, memory: int, label: str) -> Tensor:
    """g_i^T (C + damping I)^-1 g_i of a batch's samples, as many at a time as the memory allows: [N]."""
    kept = KeptGradients(recording)
    size = sum(parameter.numel() for parameter in recording.parameters.values())
    bits = torch.finfo(product_dtype(recording.parameters.values())).bits
    step = max(1, 8 * memory // (VECTORS * size * bits))
    pieces = []
    for start in range(0, recording.samples, step):
        rows = kept.rows(start, min(start + step, recording.samples))
        require_finite_rows(rows, label, first=start)
        pieces.append((rows * solve(rows)).sum(1))
    return torch.cat(pieces)


def _operator(curvature: Any, model: nn.Module, data: Any, train: Any, loss: Loss | None, chosen: list[str]) -> Any:
    if isinstance(curvature, str):
        return make_curvature(curvature, model, data if train is None else train, loss=loss, params=chosen)
    if train is not None:
        raise ValueError("train is given, but curvature is an operator, which has samples of its own")
    if not hasattr(curvature, "solve") and not hasattr(curvature, "matmat"):
        kinds, kind = ", ".join(map(repr, CURVATURES)), type(curvature).__name__
        raise TypeError(f"curvature is a {kind}, expected one of {kinds}, or an operator with .solve or .matmat")
    names = list(getattr(curvature, "parameters", chosen))
    if names != chosen:
        different = sorted(set(names) ^ set(chosen))
        raise ValueError(f"curvature is over other parameters than params: {', '.join(different[:5])}")
    return curvature


class _Solve:
    """(C + damping I)^-1 times blocks of rows, with a record of how well that went."""

    def __init__(
        self, operator: Any, solver: str, damping: float | Literal["auto"], tol: float | None, max_iter: int
    ) -> None:
        self._operator, self._damping, self._tol, self._max_iter = operator, damping, tol, max_iter
        self._solver, self._factor = solver, torch.empty(0)
        self._worst, self._failed, self._reasons = 0.0, 0, set[str]()

    def __call__(self, rows: Tensor) -> Tensor:
        """[K, P] -> [K, P]."""
        if self._damping == "auto":
            self._damping = self._auto(rows)
        if hasattr(self._operator, "solve"):
            solve: Callable[[Tensor, float], Tensor] = self._operator.solve
            return solve(rows, float(self._damping))
        damping = float(self._damping)
        if self._solver == "exact":
            return torch.cholesky_solve(rows.T.double(), self._factored(damping)).T.to(rows.dtype)
        solution = cg(self._operator, rows, damping=damping, tol=self._tol, max_iter=self._max_iter)
        for residual, reason in zip(torch.as_tensor(solution.residual).tolist(), solution.reason, strict=True):
            went_wrong = reason not in ("tolerance", "stopped", "max_iter")
            if went_wrong or (self._tol is not None and reason != "tolerance"):
                self._failed, self._worst = self._failed + 1, max(self._worst, residual)
                self._reasons.add(reason)
        return solution.x

    def _factored(self, damping: float) -> Tensor:
        if not len(self._factor):
            if not hasattr(self._operator, "dense"):
                raise ValueError("solver is 'exact', but curvature has no dense(): use 'cg'")
            matrix = self._operator.dense().double()
            matrix.diagonal().add_(damping)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if int(failed):
                raise ValueError(f"the curvature plus damping {damping:.3g} is not positive definite: use more damping")
            self._factor = factor
        return self._factor

    def _auto(self, rows: Tensor) -> float:
        if not hasattr(self._operator, "matmat"):
            raise ValueError("damping is 'auto', but curvature has no matmat: give damping as a number")
        return auto_damping(self._operator, rows)

    def warn(self) -> None:
        """Say how many samples' solves did not reach the tolerance."""
        if self._failed:
            reasons = ", ".join(sorted(self._reasons))
            warn_user(
                f"conjugate gradients did not reach tol={self._tol} for {self._failed} samples ({reasons}), with "
                f"relative residuals up to {self._worst:.2g}. Raise max_iter or damping (now {self._damping:.3g})",
                ConvergenceWarning,
            )
