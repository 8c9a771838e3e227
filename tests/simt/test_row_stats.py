"""The CUDA kernels of row_stats, run on the CPU under several thread schedules, against the reference."""

import ctypes
import math
from ctypes import byref, c_double, c_int64, c_void_p

import pytest
import torch

from kdaif_fast.reference import row_stats as reference
from tests.ops.row_stats_cases import IGNORED, assert_close, expected_of, inputs

from .building import CSRC, CXX

ORDERS = {
    **{"forward": 0, "reverse": 1, "odd before even": 2, "random": 3},
    **{"warp by warp": 4, "warp by warp, last first": 5},
}
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

pytestmark = pytest.mark.skipif(CXX is None or not CSRC.exists(), reason="needs a C++ compiler and the sources")


class Call(ctypes.Structure):  # as in row_stats.cpp
    _fields_ = (
        [(name, c_void_p) for name in ("student", "teacher", "labels", "stats", "argmax")]
        + [(name, c_int64) for name in ("N", "V", "student_stride", "teacher_stride")]
        + [(name, c_int64) for name in ("first_class", "class_count", "ignore_index")]
        + [("temperature", c_double)]
    )


@pytest.fixture
def driver(row_stats_driver):
    return row_stats_driver


def run(driver, order, student, teacher=None, labels=None, T=1.0, first=0, count=0, ignore=IGNORED):
    N, V = student.shape
    stats = torch.full((reference.packed_size(teacher is not None), N), 7.0, dtype=reference.statistics_dtype(student))
    argmax = torch.full((1 if teacher is None else 2, N), -7)
    pointers = [None if x is None else x.data_ptr() for x in (student, teacher, labels, stats, argmax)]
    strides = (student.stride(0), 0 if teacher is None else teacher.stride(0))
    driver.row_stats(TYPES[student.dtype], order, byref(Call(*pointers, N, V, *strides, first, count, ignore, T)))
    return stats, argmax


def same_bits(a, b):
    return all(torch.equal(x.nan_to_num(-1e30), y.nan_to_num(-1e30)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (4, 37), (3, 130), (2, 700), (1, 2100)])
@pytest.mark.parametrize(("has_teacher", "has_labels"), [(True, True), (True, False), (False, True), (False, False)])
def test_against_reference_under_every_schedule(driver, dtype, shape, has_teacher, has_labels):
    student, teacher, labels = inputs(*shape, dtype)
    teacher[-1] = student[-1]  # a small divergence, which takes another pass
    V = shape[1]
    arguments = (student, teacher if has_teacher else None, labels if has_labels else None, 2.5, V // 3, V - V // 3)
    results = [run(driver, order, *arguments) for order in ORDERS.values()]
    assert all(same_bits(results[0], others) for others in results[1:])
    expected, argmax = expected_of(*arguments)
    assert_close(results[0][0], expected, dtype)
    assert torch.equal(results[0][1], argmax)
    if has_teacher:
        assert (results[0][0][-2:, -1] == 0).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_ties_masks_and_rows_without_a_softmax(driver, dtype):
    student, teacher, labels = inputs(9, 140, dtype)
    labels[:] = 0
    labels[8] = IGNORED
    student[:, 3] = teacher[:, 3] = -math.inf
    student[1, 1:] = teacher[1, 1:] = -math.inf  # all but one class
    student[2, 5] = teacher[6, 5] = -math.inf  # one side only
    student[3, [66, 137]] = student[4, 7] = math.nan
    student[4, 6] = teacher[4, 0] = math.inf
    student[5] = -math.inf
    student[6] = teacher[7] = 1  # ties
    student[8, [40, 90, 139]] = 100
    results = [run(driver, order, student, teacher, labels, 0.5, 2, 10) for order in ORDERS.values()]
    assert all(same_bits(results[0], others) for others in results[1:])
    expected, argmax = expected_of(student, teacher, labels, 0.5, 2, 10)
    assert_close(results[0][0], expected, dtype)
    assert torch.equal(results[0][1], argmax)
    assert argmax[0, [3, 4, 5, 6, 8]].tolist() == [66, 7, 0, 0, 40]


def test_labels_outside_make_nan_of_what_depends_on_them(driver):
    student, teacher, labels = inputs(4, 70, torch.float32)
    labels[:] = torch.tensor([0, 70, -1, 2**62])
    assert_close(run(driver, 3, student, teacher, labels)[0], expected_of(student, teacher, labels)[0], torch.float32)


@pytest.mark.parametrize("T", [0.01, 1e4])
def test_extremes(driver, T):
    student, teacher, labels = inputs(4, 70, torch.float32)
    student, teacher = (x * (1e4 / x.abs().max()) for x in (student, teacher))
    stats, argmax = run(driver, 0, student, teacher, labels, T)
    expected, expected_argmax = expected_of(student, teacher, labels, T)
    assert_close(stats, expected, torch.float32)
    assert torch.equal(argmax, expected_argmax)


def test_small_divergences_keep_their_digits(driver):
    student = 3 * torch.randn(3, 300)
    teacher = student + 1e-3 * torch.randn_like(student)
    ours, expected = run(driver, 0, student, teacher)[0][-2:], expected_of(student, teacher)[0][-2:]
    torch.testing.assert_close(ours.double(), expected, rtol=2e-3, atol=0)


def test_row_strides(driver):
    student, teacher, labels = inputs(5, 40, torch.float32)
    padded = torch.full((5, 64), math.nan)
    padded[:, :40] = student
    ours = run(driver, 0, padded[:, :40], teacher[:1].expand(5, 40), labels)
    assert same_bits(ours, run(driver, 0, student, teacher[:1].repeat(5, 1), labels))
