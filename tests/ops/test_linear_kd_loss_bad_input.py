"""linear_kd_loss: errors name the argument, its value, and what was expected."""

import pytest
import torch

from kdaif_fast.ops import linear_kd_loss
from tests.ops.linear_kd_loss_cases import problem

BAD = {
    "hidden is None (NoneType), expected a torch.Tensor": dict(hidden=None),
    "hidden has dtype torch.int64, expected one of float32": dict(hidden=torch.zeros(7, 5, dtype=torch.int64)),
    "hidden has shape (), expected [..., D]": dict(hidden=torch.tensor(0.0)),
    "hidden has shape (7, 0), expected [..., D] with a last axis of at least 1": dict(hidden=torch.zeros(7, 0)),
    "head_weight has shape (11, 4), expected [V, 5]": dict(head_weight=torch.zeros(11, 4)),
    "head_weight has shape (0, 5), expected [V, 5] with V >= 1": dict(head_weight=torch.zeros(0, 5)),
    "head_bias has shape (5,), expected (11,) as [V]": dict(head_bias=torch.zeros(5)),
    "teacher has shape (6, 3), expected (7, 3)": dict(teacher=torch.zeros(6, 3)),
    "teacher has shape (7, 3), expected (7, 11) as logits": dict(teacher_head=None, teacher_bias=None),
    "teacher_bias is given without teacher_head": dict(teacher=torch.zeros(7, 11), teacher_head=None),
    "teacher_head has shape (10, 3), expected (11, 3)": dict(teacher_head=torch.zeros(10, 3)),
    "teacher_bias has shape (1,), expected (11,)": dict(teacher_bias=torch.zeros(1)),
    "labels has shape (1,), expected (7,)": dict(labels=torch.tensor([1])),
    "labels have dtype torch.int32": dict(labels=torch.zeros(7, dtype=torch.int32)),
    "labels[2] is 11, expected 0 <= label < 11": dict(labels=torch.tensor([0, -100, 11, 0, 0, 0, 0])),
    "labels[1] is -1, expected 0 <= label < 11": dict(labels=torch.tensor([0, -1, 1, 0, 0, 0, 0])),
    "weight has shape (2,), expected (7,)": dict(weight=torch.ones(2)),
    "weight has dtype torch.int64": dict(weight=torch.ones(7, dtype=torch.int64)),
    "head_weight is on device meta, expected cpu": dict(head_weight=torch.zeros(11, 5, device="meta")),
    "temperature is 0, expected a positive finite number": dict(temperature=0),
    "alpha is 1.5, expected a number from 0 to 1": dict(alpha=1.5),
    "reduction is 'average', expected one of": dict(reduction="average"),
    "ignore_index is 1.0 (float), expected an integer": dict(ignore_index=1.0),
    "chunk_rows is 0, expected an integer >= 1": dict(chunk_rows=0),
    "chunk_rows is '8' (str), expected an integer >= 1": dict(chunk_rows="8"),
}


class TestBadInput:
    @pytest.mark.parametrize("message", BAD)
    def test_is_named(self, message):
        arguments = problem() | BAD[message]
        with pytest.raises((ValueError, TypeError)) as error:
            linear_kd_loss(**arguments)
        assert str(error.value).startswith("linear_kd_loss: " + message)
