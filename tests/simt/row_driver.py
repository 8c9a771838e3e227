"""tests/simt/row_divergence.cpp from Python: an op's arguments as the kernels' structures, and random ones."""

import ctypes
import math
from ctypes import Structure, byref, c_bool, c_char_p, c_double, c_int, c_int64, c_void_p
from typing import NamedTuple

import torch

from kdaif_fast.reference import row_divergence as reference
from kdaif_fast.reference.row_terms import CROSS_ENTROPY, KL, LOGITS, PROBABILITIES, TOP_K, Choices, accumulation_dtype

from .building import CSRC, CXX  # noqa: F401 (for the tests)

ORDERS = {
    **{"forward": 0, "reverse": 1, "odd before even": 2, "random": 3},
    **{"warp by warp": 4, "warp by warp, last first": 5},
}
ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class RowDivergence(Structure):  # as in csrc/common/row_divergence_args.h
    _fields_ = (
        [(name, c_void_p) for name in ("student", "teacher", "indices", "second", "labels", "soft_labels")]
        + [(name, c_void_p) for name in ("class_weight", "mask", "weight", "rows")]
        + [(f"{name}_stride", c_int64) for name in ("student", "teacher", "second", "soft_labels", "mask")]
        + [(name, c_double) for name in ("temperature", "ce", "kd", "other", "label_mix", "interpolation", "gate")]
        + [(name, c_double) for name in ("smoothing", "skew")]
        + [("kind", c_int), ("form", c_int), ("mixes", c_bool), ("exclude_label", c_bool)]
        + [(name, c_int64) for name in ("first_class", "class_count", "ignore_index", "top_k", "N", "V")]
    )


class Tangents(Structure):  # as in csrc/cuda/row_divergence_plan.h
    _fields_ = [  # noqa: RUF012
        ("u", c_void_p),
        ("out", c_void_p),
        ("K", c_int64),
        ("tangent_stride", c_int64),
        ("row_stride", c_int64),
    ]


class Arguments(NamedTuple):
    """The op's, in its order."""

    student: torch.Tensor
    teacher: torch.Tensor | None
    indices: torch.Tensor | None
    second: torch.Tensor | None
    labels: torch.Tensor | None
    soft_labels: torch.Tensor | None
    class_weight: torch.Tensor | None
    mask: torch.Tensor | None
    weight: torch.Tensor | None
    rows: torch.Tensor | None
    numbers: list[float]
    choices: Choices

    def wide(self):
        """The same in float64."""
        return Arguments(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in self))

    def structure(self):
        fields = {}
        for name, x in zip(self._fields[:10], self[:10], strict=True):
            fields[name] = None if x is None else x.data_ptr()
            if f"{name}_stride" in dict(RowDivergence._fields_) and x is not None:
                fields[f"{name}_stride"] = 0 if name == "mask" and x.shape[0] == 1 else x.stride(0)
        names = ("temperature", "ce", "kd", "other", "label_mix", "interpolation", "gate", "smoothing", "skew")
        fields |= dict(zip(names, self.numbers, strict=True)) | self.choices._asdict()
        top_k = 0 if self.indices is None else self.indices.shape[1]
        return RowDivergence(**fields, top_k=top_k, N=self.student.shape[0], V=self.student.shape[1])


class FastPlan(NamedTuple):
    is_common: int
    path: int
    width: int
    packets: int
    blocks: int
    blocks_y: int
    threads: int
    chunk: int
    chunks: int
    workspace: int
    shared: int
    slots: int
    ring_chunks: int
    kept: int
    again: int
    shared_limit: int


class HvpPlan(NamedTuple):
    path: int
    width: int
    blocks: int
    threads: int
    shared: int
    items: int
    slots: int
    ring_chunks: int
    kept: int
    again: int
    shared_limit: int


WARP, BLOCK, WIDE, SPLIT, RING = range(5)
H200, A100, ADA = 232448, 166912, 101376  # bytes of shared memory that a block can have


class Gpu(NamedTuple):
    """What plans depend on besides the arguments. wish: as in KDAIF_ROW_PLAN."""

    multiprocessors: int = 1
    shared: int = H200
    wish: str | None = None

    def arguments(self):
        wish = None if self.wish is None else self.wish.encode()
        return c_int64(self.multiprocessors), c_int64(self.shared), c_char_p(wish)


class Trapped(RuntimeError):  # noqa: N818
    pass


def tangents_structure(u, out):
    return Tangents(u.data_ptr(), out.data_ptr(), u.shape[0], u.stride(0), u.stride(1))


class Driver:
    """The kernels as functions of the op's arguments. Outputs start as NaN: what is not written is seen."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        for name in ("row_divergence", "row_divergence_hvp", "row_divergence_fast", "row_divergence_fast_hvp"):
            getattr(self.library, name).restype = c_bool

    def loss_and_grad(self, a, order=0, check=True, want=(True, True)):
        loss = torch.full(a.student.shape[:1], math.nan, dtype=accumulation_dtype(a.student))
        grad = torch.full(a.student.shape, math.nan, dtype=a.student.dtype)
        pointers = [c_void_p(x.data_ptr() if wanted else None) for x, wanted in zip((loss, grad), want, strict=True)]
        element = ELEMENTS[a.student.dtype]
        if not self.library.row_divergence(element, order, c_bool(check), byref(a.structure()), *pointers):
            raise Trapped
        return loss, grad

    def fast(self, a, order=0, check=True, want=(True, True), gpu=Gpu()):  # noqa: B008
        loss = torch.full(a.student.shape[:1], math.nan)
        grad = torch.full(a.student.shape, math.nan, dtype=a.student.dtype)
        pointers = [c_void_p(x.data_ptr() if wanted else None) for x, wanted in zip((loss, grad), want, strict=True)]
        d, element = byref(a.structure()), ELEMENTS[a.student.dtype]
        if not self.library.row_divergence_fast(element, order, c_bool(check), d, *pointers, *gpu.arguments()):
            raise Trapped
        return loss, grad

    def plan(self, a, gpu=Gpu()):  # noqa: B008
        """The fast kernels' launch; no output: its address would fit all loads."""
        return self.plan_of(a.structure(), ELEMENTS[a.student.dtype], gpu)

    def plan_of(self, structure, element, gpu):
        out = (c_int64 * len(FastPlan._fields))()
        self.library.plan(byref(structure), element, c_void_p(None), *gpu.arguments(), out)
        return FastPlan(*out)

    def general_launch(self, N, V):
        out = (c_int64 * 3)()
        self.library.launch_of_general(c_int64(N), c_int64(V), out)
        return tuple(out)

    def fast_hvp(self, a, tangents, order=0, check=True, gpu=Gpu()):  # noqa: B008
        out = torch.full(tangents.shape, math.nan, dtype=a.student.dtype)
        arguments = [ELEMENTS[a.student.dtype], order, c_bool(check), byref(a.structure())]
        arguments += [byref(tangents_structure(tangents, out)), *gpu.arguments()]
        if not self.library.row_divergence_fast_hvp(*arguments):
            raise Trapped
        return out

    def hvp_plan(self, structure, element, K, gpu):
        t = Tangents(4096, 4096, K, structure.N * structure.V, structure.V)
        out = (c_int64 * len(HvpPlan._fields))()
        self.library.hvp_plan(byref(structure), element, byref(t), *gpu.arguments(), out)
        return HvpPlan(*out)

    def hvp(self, a, tangents, gauss_newton=False, order=0, check=True):
        out = torch.full(tangents.shape, math.nan, dtype=a.student.dtype)
        arguments = [ELEMENTS[a.student.dtype], order, c_bool(check), byref(a.structure()), c_bool(gauss_newton)]
        if not self.library.row_divergence_hvp(*arguments, byref(tangents_structure(tangents, out))):
            raise Trapped
        return out


def random_logits(generator, N, V, dtype, scale=3.0):
    return (scale * torch.randn(N, V, dtype=torch.float64, generator=generator)).to(dtype)


def random_probabilities(generator, N, V, dtype):
    return random_logits(generator, N, V, torch.float64).softmax(-1).to(dtype)


def arguments(
    N=3, V=33, dtype=torch.float32, *, kind=KL, form=LOGITS, T=2.0, ce=0.5, kd=0.7, other=0.3, seed=0, second=False,
    label_mix=0.0, interpolation=1.0, gate=0.0, smoothing=0.0, skew=0.4, exclude_label=False, first_class=0,
    class_count=None, top_k=5, mask=None, soft_labels=False, class_weight=False, weight=True, rows=False,
):  # fmt: skip
    """Random arguments with these options. mask: None, or the number of rows it has."""
    g = torch.Generator().manual_seed(seed)
    C, wide = V - first_class if class_count is None else class_count, torch.empty(0, dtype=dtype)
    wide = accumulation_dtype(wide)

    def target(columns):
        return random_logits(g, N, columns, dtype) if form == LOGITS else random_probabilities(g, N, columns, wide)

    teacher, indices = target(C), None
    if form == TOP_K:
        k = min(top_k, C)
        indices = torch.stack([torch.randperm(C, generator=g)[:k] for _ in range(N)])
        teacher = teacher.gather(-1, indices)
    allowed = None
    if mask is not None:
        allowed = torch.rand(mask, C, generator=g) < 0.7
        allowed[:, 0] = True
    per_row = torch.rand(7, N, generator=g, dtype=torch.float64).to(wide) + 0.5 if rows else None
    if per_row is not None:
        per_row[4:] -= 0.5
        per_row[5, 0] = interpolation
    positive = torch.rand(V, generator=g, dtype=torch.float64).to(wide)
    return Arguments(
        random_logits(g, N, V, dtype), teacher, indices, target(C) if second else None,
        torch.randint(V, (N,), generator=g), random_probabilities(g, N, V, wide) if soft_labels else None,
        positive + 0.5 if class_weight else None, allowed,
        torch.randn(N, generator=g, dtype=torch.float64).to(wide) if weight else None, per_row,
        [T, ce, kd, other, label_mix, interpolation, gate, smoothing, skew],
        Choices(kind, form, int(second or label_mix != 0), int(exclude_label), first_class, C, -100),
    )  # fmt: skip


def error(ours, expected):
    return ((ours.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


GRAD_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def tangents(a, K=6):
    g = torch.Generator().manual_seed(1)
    return torch.randn(K, *a.student.shape, dtype=torch.float64, generator=g).to(a.student.dtype)


def check_loss_and_grad(ours, a):
    dtype, wide = a.student.dtype, a.wide()
    loss, grad = ours
    if a.student.shape[1] == 1:  # nothing to decide: the reference is 0 up to rounding
        assert max(loss.abs().max(), grad.abs().max()) < 1e-5
        return
    assert error(loss, reference.row_divergence(*wide)) < LOSS_TOLERANCE[dtype]
    assert error(grad, reference.row_divergence_grad(*wide)) < GRAD_TOLERANCE[dtype]


def check_hvp(ours, a, u, gauss_newton):
    expected = reference.row_divergence_hvp(u.double(), gauss_newton, *a.wide())
    assert error(ours, expected) < 3 * GRAD_TOLERANCE[a.student.dtype]


OPTIONS = {
    "none": {},
    "a slice of the classes": {"first_class": 3, "class_count": 20},
    "a mask for each row": {"mask": 4},
    "one mask": {"mask": 1},
    "without the label": {"exclude_label": True},
    "mixed with the label": {"label_mix": 0.3},
    "two teachers": {"second": True, "gate": 0.4},
    "between teacher and student": {"interpolation": 0.6},
    "the student as its own teacher": {"interpolation": 0.0},
    "smoothing": {"smoothing": 0.1},
    "soft labels": {"soft_labels": True},
    "soft labels in the target": {"soft_labels": True, "label_mix": 0.3, "mask": 4, "exclude_label": True},
    "class weights": {"class_weight": True},
    "settings by row": {"rows": True},
    "no weights": {"weight": False},
    "no cross-entropy": {"ce": 0.0},
    "no divergence": {"kd": 0.0, "other": 0.0},
    "probabilities": {"form": PROBABILITIES},
    "probabilities without the label": {"form": PROBABILITIES, "exclude_label": True, "mask": 4},
    "two of probabilities": {"form": PROBABILITIES, "second": True, "gate": 0.4, "label_mix": 0.2},
    "top k": {"form": TOP_K},
    "all classes as top k": {"form": TOP_K, "top_k": 33},
    "top k and more": {"form": TOP_K, "mask": 4, "exclude_label": True, "label_mix": 0.2, "class_weight": True,
                       "first_class": 2, "class_count": 25},
    "nearly everything": {"second": True, "label_mix": 0.2, "exclude_label": True, "mask": 4, "class_weight": True,
                          "smoothing": 0.1, "first_class": 2, "class_count": 25, "rows": True},
}  # fmt: skip

COMMON = {
    "both parts": {},
    "at T = 3": {"T": 3.0},
    "at T = 1": {"T": 1.0},
    "cross-entropy with the teacher": {"kind": CROSS_ENTROPY, "ce": 0.0},
    "the teacher alone": {"ce": 0.0, "weight": False},
    "the labels alone": {"kd": 0.0},
}
