"""Few labels and many samples without: the teacher labels them, and hears what its labels were worth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..._model import DistillationLoss, Loss
from ..._warn import warn_user
from ..distiller import Distiller
from ..indexed import as_batch, in_order, on_device, shared_samples
from ..label_revision import LabelRevisionLoss
from ..mechanisms import Mechanism, find_mechanism
from ..modes import evaluating, unwrapped
from ..optimising import OptimizerLike, take_step
from ..runs.progress import TrainingProgress
from ..runs.random_states import random_state, set_random_state
from ..step import JointStep
from ..tally import Tally
from ..taught import teacher_logits
from .meta_pseudo_labels import MetaFeedback, MetaStep
from .pseudo_labels import PseudoLabels, as_loader, joined
from .soft_targets import SoftTargetLoss, most_likely

FEEDBACKS = ("influence", "none", "meta")


class SemiSupervisedDistiller(Distiller):
    """Distills with few labelled samples and many unlabelled ones, in rounds (KD-AIF, semi-supervised).

    First the teacher learns from the labelled samples. Then, in every round: it gives each unlabelled sample a
    pseudo-label; both networks are trained on labelled and pseudo-labelled samples together, as Distiller trains; the
    influence of every one of them, pseudo-labels and all, on the labelled validation data is measured at the student,
    and the weights that follow are those of the student's and the teacher's losses, as the mechanism says. The teacher
    that comes out of a round gives the pseudo-labels of the next. Networks and optimizers go on from round to round.

    All samples have one numbering: the L labelled ones first, 0 ... L - 1, in the order of their data set, then the
    unlabelled ones, L ... L + U - 1. Weights, phi, facts and log go by it.

    An unlabelled sample whose most likely class changes from one round to the next starts anew with weight 1: what was
    measured was the influence of another label. Those below the threshold keep their weights, which nobody uses.

    Args:
        teacher, student, teacher_optimizer, student_optimizer: as for Distiller. Without a teacher_optimizer the
            teacher has to be trained already (mechanism "vanilla", teacher_epochs 0).
        pseudo_labels: "soft", the teacher's probabilities at the start of the round, or "hard", their largest class.
            No gradient goes through them.
        threshold: in [0, 1): unlabelled samples of which the teacher is less sure than that are left out of a round.
        feedback: "influence"; "none", plain pseudo-labels; or "meta", one number a batch that multiplies what the
            teacher learns of its pseudo-labels, in the manner of Meta Pseudo Labels, see `MetaStep`. With soft
            pseudo-labels that is next to nothing: at the start of a round they are what the teacher says, and the
            gradient is 0.
        feedback_rate: of "meta": what the dot product of the gradients is multiplied by; default the student's learning
            rate, as published (for plain gradient descent).
        mechanism: "M1" to "M4" with the feedback "influence", default "M3". "online" or "vanilla" with "none", default
            "online", which is M3 without weights; "vanilla" leaves the teacher as the labelled samples have made it, so
            that pseudo-labels stay what they are. "online" with "meta".
        loss: of the student. Default DistillationLoss(). With soft pseudo-labels a DistillationLoss is understood as
            the SoftTargetLoss of the same settings, and any other gets targets that are probabilities [n, V].
        teacher_loss: of the teacher, likewise; default cross-entropy with the targets, be they soft or hard.
        settings: the others of Distiller: rule, refresh, warmup_epochs (of all epochs, not those of a round), ema, ...
            Not group: one process. With "meta", accumulate has to be 1.

    Raises:
        TypeError, ValueError: arguments that do not fit together; see fit.

    Memory: what Distiller needs, and a number for every class of every unlabelled sample ("hard": one a sample).

    Source: "Knowledge Distillation with Adapted Weight" (arXiv 2501.02705), figure 3. How weights are fed back is
        read from its figures 2 and 4; whether networks start over in a round could not be read.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from kdaif_fast.distill import SemiSupervisedDistiller
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(80, 4), torch.randint(0, 3, (80,))
        >>> labelled, unlabelled = TensorDataset(x[:20], y[:20]), TensorDataset(x[20:60])
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> distiller = SemiSupervisedDistiller(
        ...     teacher, torch.nn.Linear(4, 3), torch.optim.Adam, torch.optim.Adam, warmup_epochs=0
        ... )
        >>> records = distiller.fit(labelled, unlabelled, [(x[60:], y[60:])], rounds=2, epochs=1, teacher_epochs=3)
        >>> records[-1]["round"], distiller.weights_labelled.shape, distiller.weights_unlabelled.shape
        (2, torch.Size([20]), torch.Size([40]))
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        teacher_optimizer: OptimizerLike | None,
        student_optimizer: OptimizerLike,
        *,
        pseudo_labels: str = "soft",
        threshold: float = 0.0,
        feedback: str = "influence",
        feedback_rate: float | None = None,
        mechanism: str | Mechanism | None = None,
        loss: Loss | None = None,
        teacher_loss: Loss | None = None,
        **settings: Any,
    ) -> None:
        PseudoLabels(0, 0, pseudo_labels, threshold)  # looks at these two
        if feedback_rate is not None and (feedback != "meta" or not 0 < feedback_rate < float("inf")):
            raise ValueError(f"feedback_rate is {feedback_rate!r}, expected a number > 0, and the feedback 'meta'")
        if settings.get("group") is not None:
            raise ValueError("group is given, expected None: SemiSupervisedDistiller is for one process")
        if feedback == "meta" and settings.get("accumulate", 1) != 1:
            raise ValueError(
                f"accumulate is {settings['accumulate']!r}, expected 1: the feedback 'meta' is that of a step"
            )
        if pseudo_labels == "soft":
            loss, teacher_loss = _for_soft_targets(loss), _for_soft_targets(teacher_loss)
        super().__init__(
            teacher,
            student,
            teacher_optimizer,
            student_optimizer,
            mechanism=_mechanism(feedback, mechanism),
            loss=loss,
            teacher_loss=teacher_loss,
            **settings,
        )
        self.feedback, self.feedback_rate = feedback, feedback_rate
        self._kind, self._threshold = pseudo_labels, threshold
        self._seed: int = settings.get("seed", 0)
        self._joined: DataLoader[Any] | None = None
        self._meta: MetaFeedback | None = None
        self._tally = _Tally()
        self._round_epochs: int | None = None
        self.pseudo: PseudoLabels | None = None
        """The pseudo-labels, once there are data; its `targets`, `confidence` and `used` are of unlabelled samples."""

    def join(self, labelled_loader: Any, unlabelled_loader: Any) -> DataLoader[Any]:
        """Look at the data; `fit` does this itself.

        Args:
            labelled_loader: as for fit.
            unlabelled_loader: as for fit.

        Returns:
            One loader over all samples, with indices: what `prepare` and `step` take. `start_round` gives it its
            pseudo-labels.

        Raises:
            TypeError, ValueError: as fit.
        """
        before = random_state()
        self._joined, pseudo = joined(labelled_loader, unlabelled_loader, self._kind, self._threshold)
        set_random_state(before)
        if self.pseudo is not None:
            pseudo.load_state_dict(self.pseudo.state_dict())
        self.pseudo = pseudo
        self._joint = self.weighting = None
        if self.feedback == "meta":
            meta = MetaFeedback(self._joined, pseudo.labelled, self._seed)
            if self._meta is not None:
                meta.load_state_dict(self._meta.state_dict())
            self._meta = meta
        return self._joined

    def fit(  # type: ignore[override]  # there is more data than a Distiller has
        self,
        labelled_loader: Any,
        unlabelled_loader: Any,
        val_loader: Any,
        rounds: int,
        epochs: int,
        teacher_epochs: int,
        test_loader: Any = None,
        *,
        resume: bool = True,
    ) -> list[dict[str, Any]]:
        """Train for so many rounds in all; what a run before has left in `run_dir` counts.

        Args:
            labelled_loader: a DataLoader over a map-style data set of (inputs, label) or mappings with a label, or such
                a data set.
            unlabelled_loader: likewise, of inputs alone or with labels, which are ignored. An epoch goes through all
                samples, labelled and unlabelled in one order, in batches as large as those of this loader.
            val_loader: labelled batches: what influence is on. Best not those that are trained on.
            rounds: of new pseudo-labels.
            epochs: of a round.
            teacher_epochs: of the teacher alone, on labelled_loader, before the first round.
            test_loader: accuracy is told of it, too; nothing is ever decided by it.
            resume: go on with the checkpoint in `run_dir`, if there is one, as Distiller.fit does. The pseudo-labels of
                the round are in it.

        Returns:
            One record an epoch, `history`; beside what Distiller's have, "round", "pseudo_labels_used" (share of the
            unlabelled samples), "mean_confidence" (of all) and, for "meta", "mean_feedback".

        Raises:
            TypeError: data without a fixed place for each sample.
            ValueError: no unlabelled or no labelled data; a threshold that leaves every unlabelled sample out; and what
                Distiller.fit raises.
            LossNotFiniteError: names the samples, in the numbering of all.

        Warns:
            UserWarning: training and validation data have samples in common.
        """
        for name, count, least in (("rounds", rounds, 1), ("epochs", epochs, 1), ("teacher_epochs", teacher_epochs, 0)):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ValueError(f"{name} is {count!r}, expected a whole number >= {least}")
        if self.epoch and self._round_epochs not in (None, epochs):
            raise ValueError(f"epochs is {epochs}, but the rounds so far had {self._round_epochs}")
        state = None if self.weighting is None else self.weighting.state_dict()
        train = self.join(labelled_loader, unlabelled_loader)
        self._round_epochs = epochs
        for data, name in ((labelled_loader, "labelled"), (unlabelled_loader, "unlabelled")):
            shared = shared_samples(data, val_loader)
            if shared:
                warn_user(
                    f"{shared} samples are both in the {name} and in the validation data; how they do there says "
                    "little about what training on them is worth",
                    UserWarning,
                )
        self.prepare(train, val_loader)
        if state is not None and self.weighting is not None:
            self.weighting.load_state_dict(state)
        if teacher_epochs and self.teacher_optimizer is None:
            raise ValueError("teacher_optimizer is None, but teacher_epochs > 0 trains the teacher")
        if self.teacher_optimizer is not None:
            self.fit_teacher(as_loader(labelled_loader, "labelled_loader"), teacher_epochs, resume=resume)
        return super().fit(train, val_loader, rounds * epochs, test_loader, resume=resume)

    def start_round(self) -> Tensor:
        """Have the teacher, as it is now, give new pseudo-labels; `fit` does this itself.

        Returns:
            The places of the unlabelled samples whose most likely class has changed, in the numbering of all samples.

        Raises:
            RuntimeError: there are no data yet.
            ValueError, LossNotFiniteError: as fit. The pseudo-labels are those of before then.
        """
        if self._joined is None or self.pseudo is None:
            raise RuntimeError(
                "there are no data yet: call join(labelled_loader, unlabelled_loader) before start_round"
            )
        with self.clock.part("teacher"), evaluating(self.teacher):
            changed = self.pseudo.renew(self._word_of_the_teacher(self._joined, self.pseudo))
        if self.weighting is not None:
            self.weighting.forget(changed)
        return changed

    @property
    def weights_labelled(self) -> Tensor | None:
        """The weights of the labelled samples, [L]; None for feedback without any."""
        weights = self.current_weights
        return None if weights is None or self.pseudo is None else weights[: self.pseudo.labelled]

    @property
    def weights_unlabelled(self) -> Tensor | None:
        """The weights of the unlabelled samples, [U]; None for feedback without any."""
        weights = self.current_weights
        return None if weights is None or self.pseudo is None else weights[self.pseudo.labelled :]

    def _word_of_the_teacher(self, loader: DataLoader[Any], pseudo: PseudoLabels) -> Iterator[Tensor]:
        """Its logits of the unlabelled samples, batch by batch, in order."""
        places = torch.arange(pseudo.labelled, pseudo.labelled + pseudo.unlabelled)
        assert loader.batch_size is not None
        for given in in_order(loader, places, loader.batch_size):
            batch = on_device(as_batch(given.batch), self._device)
            yield teacher_logits(unwrapped(self.teacher), batch.inputs)

    def _train_epoch(self, train: Any, bar: TrainingProgress) -> None:
        assert self.pseudo is not None
        assert self._round_epochs is not None
        if self._resumed is not None and not self.steps:
            # A checkpoint of the teacher's epochs, which had another loader than the rounds, that begin now.
            began = {name: replay.state() for name, replay in self._replays.items()}
            self._resumed = {**self._resumed, "replays": began}
        # A checkpoint from within a round has its pseudo-labels; one from between two has those of the round before.
        if self.pseudo.round <= self.epoch // self._round_epochs:
            # Random numbers go on as if there had been no pass for pseudo-labels: resuming cannot tell where it was.
            replay = self._replays["train"]
            if self._resumed is not None:
                replay.restore(self._resumed["replays"]["train"])
            before, place = random_state(), replay.state()
            self.start_round()
            replay.restore(place)
            set_random_state(before)
        super()._train_epoch(train, bar)

    def _joint_step(self) -> JointStep:
        if self.feedback != "meta":
            return super()._joint_step()
        if self._joint is None:
            assert self._meta is not None
            self._joint = MetaStep(
                self.teacher,
                self.student,
                feedback=self._meta,
                optimizer=self.student_optimizer,
                clip_norm=self.clip_norm,
                rate=self._rate,
                loss=self.loss,
                teacher_loss=self.teacher_loss,
                device=self._device,
                autocast=self._autocast,
                clock=self.clock,
                watch=self._watch,
            )
        return self._joint

    def _rate(self) -> float:
        if self.feedback_rate is not None:
            return self.feedback_rate
        return float(self.student_optimizer.param_groups[0]["lr"])

    def _take_steps(self) -> None:
        if self.feedback != "meta":
            super()._take_steps()
            return
        self._waiting = 0  # the student has taken its step, before the teacher's gradient was known
        assert self.teacher_optimizer is not None
        with self.clock.part("teacher"):
            take_step(self.teacher_optimizer, self.clip_norm)

    def _record(self, val_loader: Any, test_loader: Any) -> dict[str, Any]:
        assert self.pseudo is not None
        feedback = None if self._meta is None else self._meta.take_mean()
        return {
            **super()._record(val_loader, test_loader),
            "round": self.pseudo.round,
            "pseudo_labels_used": float(self.pseudo.used.double().mean()),
            "mean_confidence": float(self.pseudo.confidence.double().mean()),
            **({} if feedback is None else {"mean_feedback": feedback}),
        }

    def _parts(self) -> dict[str, Any]:
        mine = {"pseudo_labels": self.pseudo, "feedback": self._meta}
        return {**super()._parts(), **{name: part for name, part in mine.items() if part is not None}}

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "pseudo_labels": self._kind,
            "threshold": self._threshold,
            "feedback": self.feedback,
            "feedback_rate": self.feedback_rate,
            "epochs of a round": self._round_epochs,
            "labelled samples": None if self.pseudo is None else self.pseudo.labelled,
            "unlabelled samples": None if self.pseudo is None else self.pseudo.unlabelled,
        }


class _Tally(Tally):
    """Of pseudo-labelled samples the class that is most likely is what is told."""

    def _classes(self, targets: Any) -> Any:
        return most_likely(targets)


def _mechanism(feedback: Any, mechanism: str | Mechanism | None) -> Mechanism:
    """What trains which network, checked to be for this feedback."""
    if feedback not in FEEDBACKS:
        raise ValueError(f"feedback is {feedback!r}, expected one of {', '.join(FEEDBACKS)}")
    if mechanism is None:
        mechanism = "M3" if feedback == "influence" else "online"
    found = find_mechanism(mechanism)
    if feedback == "influence" and not found.weighs:
        raise ValueError(f"mechanism is {found.name!r}, which has no weights; expected M1 to M4, or feedback='none'")
    if feedback != "influence" and found.weighs:
        raise ValueError(f"mechanism is {found.name!r}, but feedback {feedback!r} has no weights; expected 'online'")
    if feedback == "meta" and not found.trains_teacher:
        raise ValueError(f"mechanism is {found.name!r}, but feedback 'meta' trains the teacher; expected 'online'")
    return found


def _for_soft_targets(loss: Loss | None) -> Loss:
    """The loss that takes probabilities for targets, too."""
    if loss is None:
        return SoftTargetLoss()
    if isinstance(loss, LabelRevisionLoss):
        raise ValueError("pseudo_labels is 'soft', but LabelRevisionLoss takes classes only; expected 'hard'")
    if isinstance(loss, DistillationLoss):
        return SoftTargetLoss(loss.temperature, loss.alpha)
    return loss
