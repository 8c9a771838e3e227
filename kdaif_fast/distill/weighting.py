"""Weights for every sample of a training set from their influence, measured again as the model learns."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._distributed import Group, gather_over_ranks
from .._model import Batch, Loss, Params, run_model, sample_losses, select_parameters
from .._warn import warn_user
from ..influence import influence_scores
from ..ops import RowStats, row_stats
from ..per_sample import WeightedStep, weighted_step
from ..solvers import ConvergenceWarning, Solution
from .finite import LossNotFiniteError
from .indexed import in_order, own_share, sample_count, shared_samples, visited
from .measured_data import default_batch_size, own_validation_data, training_data, validation_data
from .modes import device_of, evaluating, unwrapped
from .rule_checks import checked_weights, require_rule, require_usable
from .rules import WeightRule, make_rule
from .schedule import check_counts, check_schedule, require_influence_options, require_one_pass
from .semi.soft_targets import most_likely
from .statistics import SampleStatistics
from .taught import Taught, taught
from .weight_book import WeightBook

INFLUENCE: Mapping[str, Any] = {"damping": 0.01, "tol": 3e-2, "max_iter": 50}
"""A rough solve, preconditioned with K-FAC where that pays: what a ranking needs (docs/method.md, section 9).

The damping is a number because "auto", a share of the mean eigenvalue, goes to 0 with the training loss: the flips of
three runs on digits were found with an AUC of 0.895 (20 %) and 0.924 (40 %) with "auto", and 0.943 and 0.966 with 0.01.
"""

POOR_RESIDUAL = 0.9
"""A relative residual above which a direction is worth a warning."""


class InfluenceWeighting:
    """The weight of each training sample by its influence on the validation loss, measured again as the model learns.

    What a trainer of any kind asks for weights. `refresh` says when they are measured:

    - "epoch": at every call of `start_epoch`, for all samples.
    - n: before every n-th step, at `start_step`, for all samples.
    - "step": `start_epoch` only solves for the direction s, on at most `solve_samples` samples; every call of `step`
      measures phi of its batch along it, in the same pass that gives the weighted gradients.

    Args:
        model: the student. It may be wrapped (torch.compile, DistributedDataParallel).
        train: the training data: a DataLoader over a map-style data set (shuffled or not), a list of batches, or a data
            set; see `with_indices`. For measuring it is gone through in order; random augmentation is drawn
            anew for each measurement.
        val: a loader of labelled batches, or one batch: what the model shall become good at. Never the test data.
        loss: (outputs, targets[, teacher_logits]) -> [n], as for influence_scores: the loss that the model is trained
            with. Validation batches have no teacher logits.
        teacher: gives teacher logits for batches that have none.
        params: of which influence is taken; default all that require grad.
        rule: a name in RULES, or any function (stats, phi, epoch) -> weights, see `WeightRule`.
        refresh: when phi is measured, see above.
        warmup_epochs: epochs before the first measurement, in which all weights are 1.
        ema: share of the old weight that stays at each new measurement after the first, in [0, 1).
        combine: how weights are combined with those of the measurement before: None, "mean", "product", or "ema".
        normalize: divide weights by their mean over all samples.
        influence: options of influence_scores: curvature, solver, damping, tol, max_iter, solver_options, keep_graphs,
            memory. Default: damping 0.01, tol 3e-2,
            at most 50 products.
        solve_samples: the curvature is that of at most so many samples, drawn anew for every solve and held in memory;
            None for all.
        solve_every: epochs from one measurement ("step": solve) to the next.
        batch_size: of the passes that measure; default that of the loader, or 1,024 for models of at most 200,000
            parameters.
        history: how many of the last measurements are kept (and checkpointed); None for all.
        group: a process group or "world": each rank's `train` and `val` are its own shards; weights of all are known to
            all after each measurement, and those of steps at the next `start_epoch` or `gather`. Of a loader with a
            DistributedSampler, or one that Accelerate has prepared, a rank measures a fixed share, each sample once.
            `solve_samples` is of each rank.
        seed: of what rules draw, and of the samples that a solve takes.

    Raises:
        TypeError, ValueError: arguments that do not fit; training data without indices; an empty `val`; for "step", a
            layer that normalises by batch statistics, or a loss that weighs its terms by itself.

    Warns:
        UserWarning: training and validation data have samples in common; a solve that came nowhere near its solution.

    Memory: four numbers a sample, and phi of every measurement, on the CPU (`measurements`); samples of a solve with
        the teacher's logits; what influence_scores and weighted_step need.

    Source: "Knowledge Distillation with Adapted Weight" (arXiv 2501.02705).

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from kdaif_fast.distill import InfluenceWeighting, with_indices
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> data = TensorDataset(torch.randn(40, 4), torch.randint(0, 3, (40,)))
        >>> loader = with_indices(DataLoader(data, batch_size=8, shuffle=True))
        >>> weighting = InfluenceWeighting(model, loader, [(torch.randn(10, 4), torch.randint(0, 3, (10,)))])
        >>> weighting.start_epoch(0)
        True
        >>> for indices, (x, y) in loader:
        ...     losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        ...     loss = (weighting(indices) * losses).mean()
        >>> weighting.weights.shape, bool((weighting.weights != 1).all())
        (torch.Size([40]), True)
    """

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        val: Any,
        *,
        loss: Loss | None = None,
        teacher: nn.Module | None = None,
        params: Params | None = None,
        rule: str | WeightRule = "sigmoid",
        refresh: str | int = "epoch",
        warmup_epochs: int = 0,
        ema: float = 0.0,
        combine: str | None = None,
        normalize: bool = False,
        influence: Mapping[str, Any] | None = None,
        solve_samples: int | None = 2048,
        solve_every: int = 1,
        batch_size: int | None = None,
        history: int | None = 100,
        group: Group = None,
        seed: int = 0,
    ) -> None:
        self.refresh_schedule = check_schedule(refresh)
        check_counts(
            warmup_epochs=warmup_epochs,
            solve_every=solve_every,
            solve_samples=solve_samples,
            batch_size=batch_size,
            history=history,
        )
        self.model, self.teacher, self.loss = model, teacher, loss
        self._plain = unwrapped(model)
        self._device = device_of(self._plain)
        self._params = (
            None if params is None else params if isinstance(params, (str, Tensor, nn.Module)) else list(params)
        )
        self.rule = make_rule(rule) if isinstance(rule, str) else rule
        require_rule(self.rule)
        if refresh == "step":
            require_one_pass(self._plain, loss)
        self.warmup_epochs, self.solve_every = warmup_epochs, solve_every
        self._influence = {**INFLUENCE, **require_influence_options(influence)}
        self._solve_samples, self._group = solve_samples, group
        self._train = training_data(train, batch_size)
        self._batch_size = batch_size or default_batch_size(self._plain, self._train)
        self._val = validation_data(val)
        if group is not None:
            self._val = own_validation_data(self._val)
        shared = shared_samples(self._train, val)
        if shared:
            warn_user(
                f"{shared} samples are both in the training and in the validation data; how they do there says little "
                "about what training on them is worth",
                UserWarning,
            )
        samples = max(gather_over_ranks(sample_count(self._train), group))
        self._book = WeightBook(samples, self._device, combine=combine, ema=ema, normalize=normalize)
        self._phi = torch.full((samples,), float("nan"), device=self._device)
        self._generator = torch.Generator().manual_seed(seed)
        self._direction: Tensor | None = None
        self._reference: Tensor | None = None
        self._epoch = 0
        self._has_started = False
        self._has_new_phi = False
        self._history = history
        self.measurements: list[tuple[int, Tensor]] = []
        """(epoch, phi [N] on the CPU, NaN for samples that were not measured) of the last measurements."""
        self.record: dict[str, Any] = {}
        """Of the last solve: residual, iterations, damping, phi_low, phi_high, seconds."""

    @property
    def samples(self) -> int:
        """N."""
        return len(self._book)

    @property
    def weights(self) -> Tensor:
        """The weight of every sample, [N], on the model's device; 1 where none was measured. A copy."""
        return self._book.read()

    @property
    def phi(self) -> Tensor:
        """Influence of every sample as last measured, [N]; positive: harmful; NaN where none was. A copy."""
        return self._phi.clone()

    @property
    def has_measured(self) -> bool:
        """Whether there is any phi yet."""
        return bool(self.measurements) or self._has_new_phi

    @property
    def is_one_pass(self) -> bool:
        """Whether the next steps shall go through `step`: refresh is "step", and there is a direction."""
        return self._direction is not None

    def __call__(self, indices: Tensor) -> Tensor:
        """The weights of these samples, [n], on the model's device; 1 before anything was measured."""
        if not self._has_started:
            self._has_started = True
            warn_user(
                "weights were asked for before start_epoch was called: they are 1 until something is measured. Call "
                "start_epoch(epoch) at the beginning of every epoch"
                + ("" if isinstance(self.refresh_schedule, str) else ", and start_step(step) before every step"),
                UserWarning,
            )
        return self._book.read(indices.to(self._device, non_blocking=True))

    def start_epoch(self, epoch: int) -> bool:
        """Say that an epoch begins, counted from 0; measure, or solve, if it is time to. Whether that was done."""
        self._note_steps()
        self._epoch, self._has_started = epoch, True
        since = epoch - self.warmup_epochs
        if since < 0 or since % self.solve_every or not isinstance(self.refresh_schedule, str):
            return False
        self.refresh()
        return True

    def start_step(self, step: int) -> bool:
        """Say that a step begins, counted from 0 over all epochs; measure if `refresh` is a number whose turn it is."""
        n = self.refresh_schedule
        if isinstance(n, str) or step % n or self._epoch < self.warmup_epochs:
            return False
        self.refresh()
        return True

    def refresh(self) -> None:
        """Measure now: solve for the direction, and, unless refresh is "step", phi and the weights of all samples.

        What fails (memory that runs out, losses that are not finite) leaves everything as it was.
        """
        drawn, before = self._generator.get_state(), (self._direction, self._reference)
        try:
            self._refresh()
        except BaseException:
            self._generator.set_state(drawn)
            self._direction, self._reference = before
            raise

    def _refresh(self) -> None:
        self._has_started = True
        start = time.perf_counter()
        is_step = self.refresh_schedule == "step"
        own = self._own_places()
        places = self._places_to_solve(own)
        with evaluating(self._plain, self.teacher):
            taught_to_solve = self._taught(places)
            solved = list(taught_to_solve)
            if is_step or places is own:
                measured, source = places, taught_to_solve
                phi, solution = self._scores(solved, places, None)
            else:
                measured, source = own, self._taught(own)
                phi, solution = self._scores(source, measured, solved)
            # Ascending, so that a rule that draws does so as it would on one process, and in any order of the data.
            all_places, order = self._over_ranks(measured).sort()
            all_phi = self._over_ranks(phi, order)
            self._reference = all_phi
            if is_step:
                self._direction = solution.x
            else:
                self._measure(all_places, all_phi, order, measured, source.targets)
        self._book.settle()
        low, high = torch.aminmax(all_phi)
        self.record = {
            "residual": float(torch.as_tensor(solution.residual).max()),
            "iterations": int(solution.iterations),
            "damping": float(solution.damping),
            "phi_low": float(low),
            "phi_high": float(high),
            "seconds": time.perf_counter() - start,
        }
        if self.record["residual"] > POOR_RESIDUAL:
            warn_user(
                f"the solve for influence ended at a relative residual of {self.record['residual']:.2g}: weights are "
                'rough. Give influence={"max_iter": ...} a larger number, or more damping',
                ConvergenceWarning,
            )

    def step(self, batch: Any, indices: Tensor, *, divisor: float | None = None, weighs: bool = True) -> WeightedStep:
        """One pass over a batch: losses, phi, weights, and the gradient of sum_i w_i l_i / divisor added to `.grad`.

        Before there is a direction (while warming up) the weights are those of the book.

        Args:
            batch: (inputs, targets[, teacher_logits]), or a mapping; the teacher gives logits that are missing.
            indices: int64 [n].
            divisor: default n.
            weighs: False measures and keeps weights, but gives gradients without them (mechanism M2).

        Returns:
            Losses, phi and weights, each [n]; the weights are those that the gradients have.
        """
        with evaluating(self.teacher):
            samples = taught(batch, self.teacher, self._device)
        where = indices.to(self._device, non_blocking=True)
        options: dict[str, Any] = {"loss": self.loss, "params": self._params, "divisor": divisor}
        if self._direction is None:
            weights = self._book.read(where)
            return weighted_step(self.model, samples, weights if weighs else torch.ones_like(weights), **options)

        def weigh(phi: Tensor) -> Tensor:
            weights = self._weigh(where, phi, lambda: [samples], samples.targets)
            return weights if weighs else torch.ones_like(weights)

        return weighted_step(self.model, samples, weight_fn=weigh, direction=self._direction, **options)

    def forget(self, indices: Tensor) -> None:
        """Give these samples weight 1, as before their first measurement: they are not what they were any more."""
        self._book.forget(indices.to(self._device))
        self._phi[indices.to(self._device)] = float("nan")

    def gather(self) -> None:
        """Bring together what the steps of all ranks have measured; `start_epoch` does it. All ranks have to call it.

        Without a group there is nothing to do. Where two ranks have measured a sample, the last rank's word counts.
        """
        if self._group is None or self.refresh_schedule != "step":
            return
        changes = self._book.take_changes()
        phi = self._phi[changes["indices"].to(self._device)].cpu()
        for its, its_phi in gather_over_ranks((changes, phi), self._group):
            self._book.merge(its)
            self._phi[its["indices"].to(self._device)] = its_phi.to(self._device)
            self._has_new_phi |= len(its_phi) > 0

    def state_dict(self) -> dict[str, Any]:
        """All that the next weights depend on: tensors and plain values."""
        return {
            "book": self._book.state_dict(),
            "phi": self._phi,
            "direction": self._direction,
            "reference": self._reference,
            "generator": self._generator.get_state(),
            "epoch": self._epoch,
            "has_new_phi": self._has_new_phi,
            "measurements": [[epoch, phi] for epoch, phi in self.measurements],
            "record": self.record,
        }

    def require_fitting(self, state: dict[str, Any]) -> None:
        """ValueError if the state is of another number of samples or of parameters."""
        self._book.require_fitting(state["book"])
        direction = state["direction"]
        expected = sum(p.numel() for p in select_parameters(self._plain, self._params).values())
        if direction is not None and direction.numel() != expected:
            raise ValueError(f"the state's direction has {direction.numel()} elements, expected {expected}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the weighting that gave this state would; ValueError if it was of other samples or parameters."""
        self.require_fitting(state)
        direction = state["direction"]
        self._book.load_state_dict(state["book"])
        self._phi = state["phi"].to(self._device).clone()
        self._direction = None if direction is None else direction.to(self._device)
        reference = state["reference"]
        self._reference = None if reference is None else reference.to(self._device)
        self._generator.set_state(state["generator"].cpu())
        self._epoch, self._has_new_phi = state["epoch"], state["has_new_phi"]
        self._has_started = True
        self.measurements = [(epoch, phi) for epoch, phi in state["measurements"]]
        self.record = dict(state["record"])

    def _taught(self, places: Tensor) -> Taught:
        return Taught(in_order(self._train, places, self._batch_size), self.teacher, self._device)

    def _own_places(self) -> Tensor:
        """The places that training comes to, which can change with time; of several processes, this one's."""
        places = visited(self._train)
        return places if self._group is None else own_share(self._train, places)

    def _places_to_solve(self, own: Tensor) -> Tensor:
        """Some of them, or `own` itself for all."""
        largest = max(gather_over_ranks(len(own), self._group))
        if self._solve_samples is None or self._solve_samples >= largest:
            return own
        # As many numbers on all ranks, whose generators stay alike then.
        chosen = torch.randperm(largest, generator=self._generator)
        chosen = chosen[chosen < len(own)][: self._solve_samples]
        return own[chosen.sort().values]

    def _scores(self, scored: Any, places: Tensor, curved: Any) -> tuple[Tensor, Solution]:
        with warnings.catch_warnings():
            # A rough solve is what is asked for; `record` has the residual.
            warnings.simplefilter("ignore", ConvergenceWarning)
            try:
                return influence_scores(
                    self._plain,
                    scored,
                    Taught(self._val, None, self._device),
                    loss=self.loss,
                    params=self._params,
                    curvature_data=curved,
                    group=self._group,
                    return_solution=True,
                    **{"progress": False, **self._influence},
                )
            except ValueError as error:
                self._name_losses_that_are_not_finite(scored, places, error)
                raise

    def _name_losses_that_are_not_finite(self, batches: Any, places: Tensor, error: ValueError) -> None:
        losses = torch.cat([self._losses(batch) for batch in batches]).cpu()
        bad = places[~losses.isfinite()]
        if len(bad):
            raise LossNotFiniteError("the student's loss", bad.tolist()) from error

    def _measure(self, places: Tensor, phi: Tensor, order: Tensor, own: Tensor, targets: list[Any]) -> None:
        """Weights of the samples at these places, which are those of all ranks; `own` and targets are this rank's.

        `order` is that of `places` in what the ranks give one after another.
        """
        where = places.to(self._device)
        are_tensors = all(isinstance(part, Tensor) for part in targets)
        labels = self._over_ranks(torch.cat(targets), order) if are_tensors else None
        over_ranks = partial(self._over_ranks, order=order)
        weights = self._weigh(where, phi, lambda: self._taught(own), labels, over_ranks)
        require_usable(weights, places)
        self._keep()

    def _weigh(
        self,
        where: Tensor,
        phi: Tensor,
        batches: Callable[[], Any],
        targets: Any,
        over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tensor:
        assert self._reference is not None

        def rows() -> RowStats:
            found = [self._rows(batch) for batch in batches()]
            return RowStats(
                *(None if part[0] is None else over_ranks(torch.cat(part)) for part in zip(*found, strict=True))
            )

        def losses() -> Tensor:
            return over_ranks(torch.cat([self._losses(batch) for batch in batches()]))

        stats = SampleStatistics(where, targets, self._reference, self._generator, rows=rows, losses=losses)
        weights = checked_weights(self.rule(stats, phi, self._epoch), phi)
        if weights.device.type == "cpu":
            # Where phi is not finite, it is a loss that is to be told of.
            require_usable(weights.where(phi.isfinite(), 1.0), where)
        phi = phi.detach().to(self._phi)
        phi = torch.where(phi.isfinite(), phi, self._phi[where])
        weights = self._book.record(where, weights)
        self._phi[where] = phi
        self._has_new_phi = True
        return weights

    @torch.no_grad()
    def _rows(self, batch: Batch) -> RowStats:
        with evaluating(self._plain):
            outputs = run_model(self._plain, batch.inputs, "batch")
            return row_stats(outputs, batch.teacher_logits, most_likely(batch.targets))

    @torch.no_grad()
    def _losses(self, batch: Batch) -> Tensor:
        with evaluating(self._plain):
            return sample_losses(self.loss, run_model(self._plain, batch.inputs, "batch"), batch, "batch")

    def _over_ranks(self, tensor: Tensor, order: Tensor | None = None) -> Tensor:
        """What all ranks have of it, one after another, or in this order."""
        found = tensor
        if self._group is not None:
            found = torch.cat([part.to(tensor.device) for part in gather_over_ranks(tensor.cpu(), self._group)])
        return found if order is None else found[order.to(found.device)]

    def _note_steps(self) -> None:
        """Keep what the steps since the last epoch have measured, on all ranks."""
        self.gather()
        if self._has_new_phi:
            self._keep()

    def _keep(self) -> None:
        self.measurements.append((self._epoch, self._phi.cpu().clone()))
        self._has_new_phi = False
        if self._history is not None:
            del self.measurements[: -self._history]
