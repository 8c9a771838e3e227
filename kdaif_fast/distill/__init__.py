"""Distillation with weights from influence: the trainer, its mechanisms, rules and runs on disk."""

from .distiller import Distiller
from .finite import LossNotFiniteError
from .indexed import IndexedBatch, IndexedCollate, with_indices
from .label_revision import LabelRevisionLoss, label_revision
from .mechanisms import MECHANISMS, Mechanism
from .rules import RULES, WeightRule, make_rule
from .runs.checkpoint import CheckpointError
from .runs.samples_file import SampleFacts
from .semi.semi_supervised import SemiSupervisedDistiller
from .semi.soft_targets import SoftTargetLoss
from .statistics import SampleStatistics
from .step import StepResult
from .weighting import InfluenceWeighting

__all__ = [
    "MECHANISMS",
    "RULES",
    "CheckpointError",
    "Distiller",
    "IndexedBatch",
    "IndexedCollate",
    "InfluenceWeighting",
    "LabelRevisionLoss",
    "LossNotFiniteError",
    "Mechanism",
    "SampleFacts",
    "SampleStatistics",
    "SemiSupervisedDistiller",
    "SoftTargetLoss",
    "StepResult",
    "WeightRule",
    "label_revision",
    "make_rule",
    "with_indices",
]
