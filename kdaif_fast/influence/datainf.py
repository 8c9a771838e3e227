"""DataInf: influence by a closed form, a parameter at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._data import Batches
from .._model import Loss, Params, plain_model
from ..per_sample.directions import read_directions
from ..per_sample.groups import Group, blocks, visit_groups
from ..per_sample.recording import Recording
from ..solvers.damping import AUTO_DAMPING
from .damping import check_damping
from .gradients import columns, flat_rows, gradient_dots, read_data, record, require_finite_rows, squared_norms
from .progress import track
from .queries import check_queries, query_gradients


@torch.inference_mode(False)
def datainf_scores(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    loss: Loss | None = None,
    params: Params | None = None,
    queries: str = "mean",
    damping: float | Literal["auto"] = "auto",
    progress: bool | None = None,
) -> Tensor:
    """DataInf scores phi of every training sample, without an iterative solve; phi > 0 means harmful.

    phi_i = - sum_l <s_l, g_il> over the parameters l (each weight and bias by itself), where

        s_l = 1/n sum_i (g_il g_il^T + lambda_l I)^-1 v_l
            = 1/n sum_i (v_l - <v_l, g_il> / (lambda_l + |g_il|^2) g_il) / lambda_l

    with g_i the gradient of training sample i and v that of the validation loss. The mean of the inverses stands for
    the inverse of the mean, the empirical Fisher matrix of parameter l: that is the approximation, and it is better
    the smaller the parameters are. It is not near the damped Gauss-Newton answer in general.

    Args:
        model: any module whose samples are independent (eval mode for BatchNorm and Dropout). It is left unchanged.
        train: one batch, (inputs, targets[, teacher_logits]) or a mapping with those keys; or a loader of batches,
            which is gone through twice, three times for damping "auto".
        val: the validation samples, in the same forms.
        loss: function (outputs, targets[, teacher_logits]) -> [N]; default cross-entropy, or kd_loss with a teacher.
        params: names (of parameters or submodules), parameters or submodules; default all that require grad.
        queries: "mean": the mean validation loss; "per_sample": the loss of each validation sample; "per_class": the
            mean loss of the validation samples of each class, in ascending order of the classes.
        damping: lambda, a number > 0 for all parameters; "auto" is, for each, 0.1 times the mean over samples of
            |g_il|^2 / P_l, with P_l its number of elements.
        progress: show progress bars; None shows them for loaders on a terminal only.

    Returns:
        [N], or [N, K] for K queries; float32 (float64 for float64 models), on the model's device.

    Raises:
        TypeError, ValueError: arguments that do not fit together; a sample whose loss or gradient is not finite.

    Memory: two times [K, P], the result, a training step's on one batch, and blocks of per-sample gradients of one
        layer where there are several queries.

    Source: Kwon et al. 2024, "DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and Diffusion Models"
        (arXiv 2310.00902), equation 5, with the sign of this library.

    Example:
        >>> import torch, kdaif_fast
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> train = torch.randn(20, 4), torch.randint(0, 3, (20,))
        >>> val = torch.randn(10, 4), torch.randint(0, 3, (10,))
        >>> kdaif_fast.datainf_scores(model, train, val, queries="per_class").shape
        torch.Size([20, 3])
    """
    check_queries(queries)
    check_damping(damping)
    if damping == 0:
        raise ValueError("damping is 0, expected a number > 0 or 'auto'")
    plain = plain_model(model)
    any_order = () if queries == "per_sample" else ("val",)
    chosen, (train_batches, val_batches) = read_data(plain, params, any_order=any_order, train=train, val=val)
    grads, _ = query_gradients(plain, val_batches, queries, loss=loss, params=chosen, progress=progress)

    def passes(batches: Batches, what: str, receive: Callable[[str, Recording], None]) -> None:
        for label, batch in track(batches, what, progress):
            receive(label, record(plain, batch, loss, chosen, label))

    lambdas = _Damping(damping)
    if damping == "auto":
        passes(train_batches, "damping", lambdas.add)
    directions = _Directions(grads, lambdas)
    passes(train_batches, "closed form", directions.add)
    solved = directions.finish()
    phi: list[Tensor] = []
    passes(train_batches, "scores", lambda label, recording: phi.append(gradient_dots(recording, solved, label).neg_()))
    scores = torch.cat(phi)
    return scores[:, 0] if queries == "mean" else scores


class _Damping:
    """lambda of every parameter: one number, or from the mean squared norms of the samples' gradients."""

    def __init__(self, damping: float | Literal["auto"]) -> None:
        self._damping = damping
        self._squares: dict[str, Tensor] = {}
        self._samples = 0

    def add(self, label: str, recording: Recording) -> None:
        """Take in one batch."""
        for name, squares in squared_norms(recording).items():
            require_finite_rows(squares, label)
            total = squares.sum() * (AUTO_DAMPING / recording.parameters[name].numel())
            self._squares[name] = self._squares[name] + total if name in self._squares else total
        self._samples += recording.samples

    def of(self, name: str, like: Tensor) -> Tensor:
        """Of one parameter, as a tensor, so that nobody waits for its value; 0 if all of its gradients are 0."""
        if self._damping != "auto":
            return like.new_tensor(float(self._damping))
        return self._squares[name].to(like.dtype) / self._samples if name in self._squares else like.new_zeros(())


class _Directions:
    """s of K queries v, while the sum over training samples grows: sum_i <v, g_il> / (lambda_l + |g_il|^2) g_il.

    Args:
        queries: v, [K, P].
        damping: lambda.
    """

    def __init__(self, queries: Tensor, damping: _Damping) -> None:
        self._queries, self._damping = queries, damping
        self._sums = torch.zeros_like(queries)
        self._parameters: dict[str, Tensor] = {}
        self._samples = 0

    def add(self, label: str, recording: Recording) -> None:
        """Take in one batch."""
        self._parameters, where = recording.parameters, columns(recording.parameters)
        directions = read_directions(self._queries, recording.parameters)[0]

        def receive(group: Group) -> None:
            term, path = group.single(), group.members[0][0]
            if term is not None and len(self._queries) == 1:  # no gradient is formed
                (name,) = group.names
                dots, squares = term.dots(path.push(directions))[:, 0], term.squared_norms()
                grad = term.weighted(self._factors(name, dots, squares))
                grad = grad.to_dense() if grad.is_sparse else grad
                self._sums[0, where[name]] += path.pull(grad.unsqueeze(0))[name].reshape(-1)
                return
            for start, stop in blocks(group, recording.samples):
                for name, grads in group.grads(start, stop).items():
                    G = flat_rows(grads)
                    dots, squares = G @ self._queries[:, where[name]].T.to(G.dtype), G.square().sum(1, keepdim=True)
                    self._sums[:, where[name]] += self._factors(name, dots, squares).T @ G

        visit_groups(recording, receive)
        self._samples += recording.samples

    def _factors(self, name: str, dots: Tensor, squares: Tensor) -> Tensor:
        size = squares + self._damping.of(name, squares)
        return torch.where(size > 0, dots / size, 0)

    def finish(self) -> Tensor:
        """s: [K, P]."""
        solved = self._sums.div_(-self._samples).add_(self._queries)
        for name, at in columns(self._parameters).items():
            lam = self._damping.of(name, solved)
            solved[:, at] = torch.where(lam > 0, solved[:, at] / lam, 0)
        return solved
