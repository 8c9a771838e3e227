"""What the tests of row_divergence share: arguments of the ops for every kind and option, tolerances, comparison."""

import importlib
from dataclasses import dataclass

import pytest
import torch

import kdaif_fast
from kdaif_fast.reference import row_terms as terms
from kdaif_fast.reference.row_terms import accumulation_dtype

ops = importlib.import_module("kdaif_fast.ops.row_ops")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Largest allowed relative error (2-norm) against float64: a few rounding errors of the output's dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 5e-4}
LOSS_TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-6, torch.float16: 2e-6}

KIND_NAMES = [
    "KL",
    "CROSS_ENTROPY",
    "JENSEN_SHANNON",
    "SKEW_FORWARD",
    "SKEW_REVERSE",
    "TOTAL_VARIATION",
    "PROBABILITY_MSE",
    "LOGIT_MSE",
    "LOG_COSH",
    "DECOUPLED",
    "SWAPPED_CROSS_ENTROPY",
]
BETWEEN_LOGITS = {"LOGIT_MSE", "LOG_COSH"}
HAS_KERNELS = kdaif_fast.backends()["cpu"] == "loaded"
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="no compiled CPU kernels here")


@dataclass
class Case:
    """Which part of row_divergence is used."""

    ce: float = 0.4
    kd: float = 0.7
    other: float = 0.5
    temperature: float = 1.7
    interpolation: float = 1.0
    smoothing: float = 0.0
    skew: float = 0.3
    form: int = terms.LOGITS
    top_k: int = 0
    mixes: bool = False
    second: bool = False
    exclude_label: bool = False
    first_class: int = 0
    classes: int | None = None
    soft: bool = False
    class_weight: bool = False
    mask: bool = False
    shared_mask: bool = False
    rows: bool = False
    weight: bool = True
    ignored: bool = True


CASES = {
    "all parts": Case(),
    "no second part": Case(other=0.0),
    "plain, T = 1": Case(other=0.0, temperature=1.0),
    "plain, T = 2": Case(other=0.0, temperature=2.0),
    "plain, T = 3": Case(other=0.0, temperature=3.0),
    "plain, T = 4": Case(other=0.0, temperature=4.0),
    "cross-entropy alone": Case(kd=0.0, other=0.0),
    "divergence alone": Case(ce=0.0, other=0.0),
    "second part alone": Case(ce=0.0, kd=0.0),
    "negative weights": Case(ce=-0.3, kd=-0.5, other=0.2),
    "no row weights": Case(weight=False),
    "settings by row": Case(rows=True),
    "class mask": Case(mask=True),
    "class mask for all rows": Case(shared_mask=True),
    "without the label": Case(exclude_label=True),
    "class slice": Case(first_class=2, classes=5),
    "class weights": Case(class_weight=True),
    "label smoothing": Case(smoothing=0.1),
    "soft labels": Case(soft=True),
    "soft, smoothed and weighted": Case(soft=True, smoothing=0.1, class_weight=True),
    "interpolation": Case(interpolation=0.6),
    "the student as its own target": Case(interpolation=0.0),
}
TARGETS = {
    "label mixed in": Case(mixes=True),
    "soft label mixed in": Case(mixes=True, soft=True),
    "two teachers": Case(mixes=True, second=True),
    "two teachers without the label": Case(mixes=True, second=True, exclude_label=True),
    "everything by row": Case(mixes=True, second=True, rows=True, mask=True, first_class=1, classes=6),
    "probabilities": Case(form=terms.PROBABILITIES),
    "two masked probabilities": Case(form=terms.PROBABILITIES, mixes=True, second=True, mask=True),
    "probabilities without the label": Case(form=terms.PROBABILITIES, mixes=True, exclude_label=True),
    "top-k": Case(form=terms.TOP_K, top_k=3),
    "top-k of a slice": Case(form=terms.TOP_K, top_k=2, first_class=1, classes=6, class_weight=True),
    "top-k with label, without label": Case(form=terms.TOP_K, top_k=2, mixes=True, exclude_label=True),
}
ALL = CASES | TARGETS


def cases_of(kind_name):
    """Between logits there is no target distribution, so no mixture either."""
    return CASES if kind_name in BETWEEN_LOGITS else ALL


EVERY = [(kind, name) for kind in KIND_NAMES for name in cases_of(kind)]


def arguments(kind_name, case, N=5, V=9, dtype=torch.float64, scale=2.0):
    """Random arguments for the ops, in the schema's order."""
    C = V - case.first_class if case.classes is None else min(case.classes, V - case.first_class)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    student, teacher, second = ((scale * torch.randn(N, n, dtype=torch.float64)).to(dtype) for n in (V, C, C))
    indices = None
    if case.form == terms.PROBABILITIES:
        teacher, second = torch.rand(2, N, C, dtype=wide).unbind()
    if case.form == terms.TOP_K:
        teacher, indices = teacher.to(wide).softmax(-1).topk(min(case.top_k, C))
    labels = torch.randint(V, (N,))
    if case.ignored and N > 1:
        labels[1] = -100
    mask = torch.rand(1 if case.shared_mask else N, C) > 0.3 if case.mask or case.shared_mask else None
    rows = None
    if case.rows:
        rows = torch.rand(7, N, dtype=wide) + 0.2
        rows[4:] *= 0.6
    numbers = [
        case.temperature,
        case.ce,
        case.kd,
        case.other,
        0.3 if case.mixes else 0.0,
        case.interpolation,
        0.4 if case.second else 0.0,
        case.smoothing,
        case.skew,
    ]
    count = C if case.form == terms.TOP_K else -1
    kind = getattr(terms, kind_name)
    return [
        student,
        teacher,
        indices,
        second if case.second else None,
        labels,
        torch.rand(N, V, dtype=wide) if case.soft else None,
        torch.rand(V, dtype=wide) if case.class_weight else None,
        mask,
        torch.randn(N, dtype=wide) if case.weight else None,
        rows,
        numbers,
        [kind, case.form, int(case.mixes), int(case.exclude_label), case.first_class, count, -100],
    ]


def plain_arguments(student, teacher, labels, weight=None, T=1.0, alpha=0.5):
    """Those of kd_loss."""
    numbers = [float(T), alpha, (1 - alpha) * T * T, 0.0, 0.0, 1.0, 0.0, 0.0, 0.5]
    choices = [terms.KL, terms.LOGITS, 0, 0, 0, -1, -100]
    return [student, teacher, None, None, labels, None, None, None, weight, None, numbers, choices]


def widened(args):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


def inputs(N, V, dtype=torch.float64, scale=3.0):
    student, teacher = (scale * torch.randn(2, N, V, dtype=torch.float64)).to(dtype).unbind()
    labels = torch.randint(V, (N,))
    if N > 1:
        labels[0], labels[1] = 0, V - 1
    return student, teacher, labels, torch.randn(N, dtype=accumulation_dtype(student))


def relative_error(ours, expected):
    ours, expected = ours.double(), expected.double()
    assert ours.shape == expected.shape
    return ((ours - expected).norm() / expected.norm().clamp(min=1e-30)).item() if expected.numel() else 0.0
