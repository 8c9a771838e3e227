"""Influence scores: the whole recipe, on top of a curvature operator and a solver, for a batch or a whole data set."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .._data import Batches
from .._distributed import Group, together
from .._model import Loss, Params, plain_model, select_parameters
from ..curvature import CurvatureOperator, StreamedCurvature, make_curvature
from ..solvers import Solution
from .loaders import require_every_sample, require_order, samples_in
from .preconditioning import check_preconditioner
from .queries import check_queries
from .rank import SETTLED, SETTLED_PRECONDITIONED, RankSettled, sample_scores
from .result_file import ResultFile
from .resuming import load_solution, open_result, require_alike, save_solution
from .solving import Tolerance, check_settings, solve_queries
from .streaming import stream_scores
from .validation import validation_gradients


@overload
def influence_scores(
    model: nn.Module,
    batch: Any,
    val: Any,
    *,
    loss: Loss | None = ...,
    params: Params | None = ...,
    curvature: str = ...,
    solver: str = ...,
    damping: float | Literal["auto"] = ...,
    tol: Tolerance = ...,
    max_iter: int = ...,
    return_solution: Literal[False] = ...,
    queries: Literal["mean", "per_sample", "per_class"] = ...,
    out: str | os.PathLike[str] | None = ...,
    resume: bool = ...,
    progress: bool | None = ...,
    strict: bool = ...,
    group: Group = ...,
    curvature_data: Any = ...,
    keep_graphs: bool = ...,
    memory: int | None = ...,
    solver_options: Mapping[str, Any] | None = ...,
) -> Tensor: ...
@overload
def influence_scores(
    model: nn.Module,
    batch: Any,
    val: Any,
    *,
    loss: Loss | None = ...,
    params: Params | None = ...,
    curvature: str = ...,
    solver: str = ...,
    damping: float | Literal["auto"] = ...,
    tol: Tolerance = ...,
    max_iter: int = ...,
    return_solution: Literal[True],
    queries: Literal["mean", "per_sample", "per_class"] = ...,
    out: str | os.PathLike[str] | None = ...,
    resume: bool = ...,
    progress: bool | None = ...,
    strict: bool = ...,
    group: Group = ...,
    curvature_data: Any = ...,
    keep_graphs: bool = ...,
    memory: int | None = ...,
    solver_options: Mapping[str, Any] | None = ...,
) -> tuple[Tensor, Solution]: ...
def influence_scores(
    model: nn.Module,
    batch: Any,
    val: Any,
    *,
    loss: Loss | None = None,
    params: Params | None = None,
    curvature: str = "ggn",
    solver: str = "cg",
    damping: float | Literal["auto"] = "auto",
    tol: Tolerance = 1e-3,
    max_iter: int = 500,
    return_solution: bool = False,
    queries: Literal["mean", "per_sample", "per_class"] = "mean",
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool | None = None,
    strict: bool = False,
    group: Group = None,
    curvature_data: Any = None,
    keep_graphs: bool = False,
    memory: int | None = None,
    solver_options: Mapping[str, Any] | None = None,
) -> Tensor | tuple[Tensor, Solution]:
    """Influence phi of every sample of `batch` on the loss of `val`; phi > 0 means harmful.

    phi_i = -grad L_val^T (C + damping I)^-1 grad l_i is n times the rate at which the validation loss changes with
    the weight of sample i in the mean training loss: giving sample i the weight 1 + eps changes L_val by eps phi_i / n,
    leaving it out by -phi_i / n, to first order.

    Data that do not fit into one batch are given as loaders. Nothing is then kept of a batch that is done with: the
    gradient of the validation loss is one pass over `val`, every product of the solve one over `batch`, and the scores
    are one more.

    Args:
        model: any module whose samples are independent (eval mode for BatchNorm and Dropout). It is left unchanged.
        batch: the training samples: (inputs, targets), (inputs, targets, teacher_logits), or a mapping with those
            keys. `inputs` is one tensor, a tuple of positional or a mapping of keyword arguments of the model. Or a
            loader of such batches, which gives the same ones at every pass, in the same order: a DataLoader with
            shuffle=False, a list. Batches of a loader are moved to the model's device.
        val: the validation samples, in the same forms.
        loss: function (outputs, targets[, teacher_logits]) -> [N], one loss a sample, with teacher logits for samples
            that have them. Default `DistillationLoss()`: cross-entropy, or kd_loss (temperature 1, alpha 0.5) with a
            teacher; `DistillationLoss(temperature, alpha)` is the same with other settings. As `val` is what the
            student shall become good at, it usually has no teacher logits.
        params: names (of parameters or submodules), parameters or submodules to take influence over; default all that
            require grad.
        curvature: C over `batch`: "ggn" (Gauss-Newton, positive semi-definite), "hessian", "empirical_fisher",
            "monte_carlo_fisher", "kfac", "ekfac", or "identity" (gradient dot products, no solve).
        solver: a name in `kdaif_fast.solvers.SOLVERS`: "cg", "minres" (for an indefinite Hessian), "exact", and others.
        damping: added to every eigenvalue of C; for a loss with weight decay lambda/2 |theta|^2 it is lambda. "auto" is
            0.1 times the mean eigenvalue of C, and at least 1e-6 times the largest (0 for "identity").
        tol: the relative residual at which the solve stops; None spends exactly max_iter products, without a warning;
            "rank" stops when the ranking of a sample of the training data has settled (solver "cg"; see rank.py for
            what was measured).
        max_iter: the most curvature products to spend.
        return_solution: also return the solve's `Solution`: x = (C + damping I)^-1 grad L_val, flat [P], which is the
            `direction` of weighted_step, or [K, P]; residual, iterations, damping used.
        queries: whose loss is asked about: "mean", the mean loss of `val`; "per_sample", each of its samples';
            "per_class", the mean over the samples of each class, in ascending order of the classes that `val` has.
        out: a path that ends in .npy or .safetensors (tensor "phi"), which the scores are written to as they come, with
            a record beside it. Costs one pass over the data without the model, which tells whether they are the same
            as those of a run before.
        resume: go on with what a run that was killed has left at `out`: neither the solve nor scores that are written
            are done again, and the result is the same, bit for bit. False starts over.
        progress: show progress bars; None shows them on a terminal only, and for loaders only.
        strict: raise ConvergenceError where else there is a warning.
        group: a process group, or "world": every rank gives its own shards of `batch` and `val`, of any size, and gets
            the scores of its own shard of `batch`, on the loss of all validation samples and with the curvature of all
            training samples. The queries "per_sample" are those of the first rank's shard, then the second's, and so
            on. All ranks have to call together, with the same model and settings. What is raised on one while it goes
            through its data is raised on all, an empty shard too; `out` then has "{rank}" in it.
        curvature_data: a batch or loader for C, if that shall not be over `batch`: a part of the training data, say, or
            all of them when only some are scored.
        keep_graphs: keep every batch's linearisation of a loader: products cost about half, if it fits into memory.
        memory: bytes that the vectors of the solve, and the products of many vectors, may take each beyond the
            linearisation; default 1 GiB. More queries than that allows are solved in several groups.
        solver_options: more arguments of the solver, by name, such as {"rank": 100}. {"preconditioner": ...} of "cg"
            may be "kfac", "ekfac", "none", what `solvers.cg` takes, or "auto" (default): K-FAC where `tol` is at least
            3e-2, the curvature is "ggn" or "monte_carlo_fisher", and its factors are worth their cost.

    Returns:
        phi, [N], in the order of the samples; [N, K] for K queries. float32 (float64 for float64 models), in nats. With
        `out` it is mapped from the file. With return_solution, (phi, Solution).

    Raises:
        TypeError, ValueError: arguments that do not fit together; a model that mixes samples or draws at random
            (BatchNorm or Dropout in training mode); a loss that does not return one number per sample (whether it mixes
            samples is not looked at); a sample whose loss is not finite; a loader that is empty, shuffles, drops
            samples or gives other ones at another pass; an `out` that was begun with other settings. Each names the
            argument and what was expected.
        RuntimeError: a layer or a loss whose backward pass is not differentiable itself (looked for at the first call
            with a model in float32 or float64; activation checkpointing must be off).
        OSError: `out` cannot be written, or the disk is too full for it (said before the solve, if N is known by then).
        ConvergenceError: with strict, if the solve does not reach `tol`.

    Warns:
        ConvergenceWarning: the solve did not reach `tol`, and by how much.

    Memory: the graph of one forward and one backward pass over a batch; K vectors [P], and for as many as are solved
        together (see `memory`) some eight more. The result. Nothing [N, P]; of a loader's length, nothing.

    Source: Koh and Liang 2017 (arXiv 1703.04730), equation 2; sign and scale of docs/method.md, equation 2.

    Example:
        >>> import torch, kdaif_fast
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> batch = torch.randn(20, 4), torch.randint(0, 3, (20,))
        >>> val = torch.randn(10, 4), torch.randint(0, 3, (10,))
        >>> phi = kdaif_fast.influence_scores(model, batch, val, damping=0.1)
        >>> phi.shape, bool((phi > 0).any())
        (torch.Size([20]), True)
        >>> loader = torch.utils.data.DataLoader(list(zip(*batch)), batch_size=8)
        >>> streamed = kdaif_fast.influence_scores(model, loader, val, damping=0.1)
        >>> torch.allclose(streamed, phi, atol=1e-4)
        True
        >>> kdaif_fast.influence_scores(model, loader, val, damping=0.1, queries="per_class").shape
        torch.Size([20, 3])
    """
    check_settings(solver, damping, tol, max_iter, memory)
    check_queries(queries)
    check_preconditioner(solver_options)
    if isinstance(params, Iterator):
        params = list(params)  # it would be empty the second time
    with torch.inference_mode(False):
        selected = select_parameters(plain_model(model), params)
        chosen = list(selected.values())
        device = chosen[0].device
        settings = {
            "curvature": curvature,
            "solver": solver,
            "damping": damping,
            "tol": tol,
            "max_iter": max_iter,
            "queries": queries,
        }
        alike = {**settings, "memory": memory, "out is given": out is not None, "resume": resume}
        require_alike(alike, model, list(selected), group)
        with together(group, device):
            for given, name in ((batch, "batch"), (val, "val"), (curvature_data, "curvature_data")):
                require_every_sample(given, name)
                if name != "val" or queries == "per_sample":
                    require_order(given, name)
            train = Batches(batch, "batch", device, in_order=True)
            validation = Batches(val, "val", device, in_order=queries == "per_sample")
            curved = (
                train if curvature_data is None else Batches(curvature_data, "curvature_data", device, in_order=True)
            )
        data = tuple(dict.fromkeys((train, validation, curved)))
        bars = False if progress is None and train.is_one else progress
        operator = make_curvature(
            curvature, model, curved, loss=loss, params=chosen, keep_graphs=keep_graphs, memory=memory, group=group
        )

        def settled(preconditioned: bool) -> RankSettled:
            with together(group, device):
                score = sample_scores(model, train, loss, chosen)
            return RankSettled(score, group, SETTLED_PRECONDITIONED if preconditioned else SETTLED)

        file = None
        if out is not None:
            file = open_result(
                out, resume, {**settings, "loss": loss, "solver_options": solver_options}, model, operator, data, group
            )
        solution = (
            None if file is None else load_solution(file, operator, group, must_converge=strict and tol is not None)
        )
        if solution is None:
            b, labels = validation_gradients(
                model, validation, queries, loss=loss, params=chosen, group=group, progress=bars
            )
            if file is not None:
                with together(group, device):
                    if train.count is not None:
                        file.allocate(samples_in(train), None if queries == "mean" else len(b), b.dtype)
            solution = solve_queries(
                operator,
                b,
                solver,
                damping=damping,
                tol=tol,
                max_iter=max_iter,
                strict=strict,
                memory=memory,
                options=solver_options or {},
                settled=settled,
                progress=bars,
            )
            if file is not None:
                with together(group, device):
                    save_solution(file, solution, labels)
        directions = solution.x if solution.x.dim() == 2 else solution.x[None]
        pieces = _scores(model, operator, train, curved, directions, loss, chosen, file, bars)
        phi = _collect(pieces, train, None if queries == "mean" else len(directions), directions.dtype, file)
    return (phi, solution) if return_solution else phi


def _scores(
    model: nn.Module,
    operator: CurvatureOperator,
    train: Batches,
    curved: Batches,
    directions: Tensor,
    loss: Loss | None,
    params: Params,
    file: ResultFile | None,
    progress: bool | None,
) -> Iterator[Tensor]:
    """phi of the samples that the file lacks (of all, without one), batch by batch."""
    start = 0 if file is None else file.done
    if start and start == samples_in(train):
        return
    if train is curved and train.is_one and len(directions) == 1 and isinstance(operator, StreamedCurvature):
        # The linearisation that the solve was made with is there already; with more directions another pass is cheaper.
        (objective,) = operator.objectives()
        yield -objective.dots(directions)
        return
    yield from stream_scores(model, train, directions, loss=loss, params=params, start=start, progress=progress)


def _collect(
    pieces: Iterator[Tensor], train: Batches, queries: int | None, dtype: torch.dtype, file: ResultFile | None
) -> Tensor:
    """The scores of all batches, [N] or [N, K], in memory or in the file."""
    if file is None:
        return _together([piece if queries is not None else piece[:, 0] for piece in pieces])
    file.allocate(samples_in(train), queries, dtype)
    for piece in pieces:
        file.write(piece)
    file.flush()
    return file.scores()


def _together(parts: list[Tensor]) -> Tensor:
    """All parts in one tensor; each is freed once it is in."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    stop = len(whole)
    while parts:
        part = parts.pop()
        whole[stop - len(part) : stop] = part
        stop -= len(part)
    return whole
