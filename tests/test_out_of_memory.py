"""Memory may run out at any allocation: what is raised is torch's own error, and nothing is left half done."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdaif_fast
from kdaif_fast.distill import InfluenceWeighting, with_indices

from .cases import mlp
from .gpu.calls import CALLS, as_tuple

aten = torch.ops.aten


class Allocator(TorchDispatchMode):
    """Stands between Python and memory: the operation that makes the n-th new tensor fails before it does anything."""

    def __init__(self, left=None):
        super().__init__()
        self.left, self.given = left, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        makes = any(r.alias_info is None and "Tensor" in str(r.type) for r in returns)
        if makes:
            if self.left is not None and self.given >= self.left:
                raise torch.OutOfMemoryError("out of memory, for a test")
            self.given += 1
        return func(*args, **(kwargs or {}))


def allocations(run):
    with Allocator() as allocator:
        run()
    return allocator.given


def fails_at(n, run):
    with pytest.raises(torch.OutOfMemoryError), Allocator(n):
        run()


def fails(n, run):
    """Whether it does: what tries something first that it can do without, may not; nor what needs less by now."""
    try:
        with Allocator(n):
            run()
    except torch.OutOfMemoryError:
        return True
    return False


def same(a, b):
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(as_tuple(a), as_tuple(b), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_ops(name):
    """Arguments are as they were, and the next call is right."""
    call = CALLS[name]
    tensors = call.make(torch.float32)
    before, wanted = [x.clone() for x in tensors], call.run(*tensors)
    count = allocations(lambda: call.run(*tensors))
    assert count
    for n in range(count):
        fails_at(n, lambda: call.run(*tensors))
        assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert same(call.run(*tensors), wanted)


def test_in_place_update():
    """cg_update writes only once it has all that it needs."""
    x, r, p, Ap, steps, best, keep = CALLS["cg_update"].make(torch.float32)
    before = [z.clone() for z in (x, r, best)]

    def run():
        kdaif_fast.ops.cg_update(x, r, p.t().contiguous().t(), Ap, steps, 0.1, best=best, keep=keep)

    fails_at(0, run)
    assert all(torch.equal(a, b) for a, b in zip((x, r, best), before, strict=True))


def few(count):
    """All places of the first and the last, and some between."""
    return sorted({*range(min(count, 25)), *range(25, count, 7), *range(max(count - 25, 0), count)})


@pytest.mark.parametrize("is_first", [True, False])
def test_weighted_step(is_first):
    """Parameters, optimiser and plans are as they were; the step that is tried again is the one that failed.

    `.grad` is as after a backward pass that fails: zero_grad before the next try.
    """
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    model = mlp()
    direction = torch.randn(sum(p.numel() for p in model.parameters()))

    def run(of):
        of.zero_grad()
        kdaif_fast.weighted_step(of, (x, y), weight_fn=kdaif_fast.sigmoid_weights, direction=direction, divisor=4)
        return tuple(p.grad for p in of.parameters())

    wanted = run(copy.deepcopy(model))
    optimizer = torch.optim.Adam(model.parameters())
    if not is_first:
        run(model)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    twin = copy.deepcopy(model)
    if not is_first:
        run(twin)
    failed = 0
    for n in few(allocations(lambda: run(twin))):
        each = copy.deepcopy(model) if is_first else model
        failed += fails(n, lambda each=each: run(each))
        assert all(torch.equal(v, states[0][k]) for k, v in each.state_dict().items())
        assert str(optimizer.state_dict()) == str(states[1])
        assert same(run(each), wanted)
    assert failed


def make_weighting(refresh):
    torch.manual_seed(1)
    model = mlp()
    data = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.randint(3, (16,)))
    loader = with_indices(torch.utils.data.DataLoader(data, batch_size=8))
    val = [(torch.randn(9, 4), torch.randint(3, (9,)))]
    options = {"damping": 0.1, "max_iter": 4}
    weighting = InfluenceWeighting(model, loader, val, refresh=refresh, ema=0.5, combine="mean", influence=options)
    return model, weighting, list(loader)


def book_of(weighting):
    state = weighting.state_dict()
    state["record"] = {}  # its seconds
    return copy.deepcopy(state)


def same_book(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_steps_of_a_weighting():
    """The book has all of a step's measurement or none of it."""
    model, weighting, batches = make_weighting("step")
    _, twin, _ = make_weighting("step")
    for each in (weighting, twin):
        each.start_epoch(0)
        each.step(batches[0].batch, batches[0].indices)
    indices, batch = batches[1]
    before = book_of(weighting)
    count = allocations(lambda: twin.step(batch, indices))
    after = book_of(twin)
    failed_before, failed_after = 0, 0
    for n in range(count):
        model.zero_grad()
        failed = fails(n, lambda: weighting.step(batch, indices))
        now = book_of(weighting)
        is_before = torch.equal(now["book"]["measured"], before["book"]["measured"])
        same_book(now, before if is_before else after)
        failed_before, failed_after = failed_before + (failed and is_before), failed_after + (failed and not is_before)
        weighting.load_state_dict(before)
    assert failed_before
    assert failed_after
    weighting.step(batch, indices)
    same_book(book_of(weighting), after)


@pytest.mark.parametrize("refresh", ["step", "epoch"])
def test_measurements_of_a_weighting(refresh):
    _, weighting, batches = make_weighting(refresh)
    weighting.start_epoch(0)
    if refresh == "step":
        weighting.step(batches[0].batch, batches[0].indices)
        weighting.start_epoch(1)
    before = book_of(weighting)
    twin = make_weighting(refresh)[1]
    twin.start_epoch(0)
    twin.load_state_dict(before)
    count = allocations(twin.refresh)
    after, failed = book_of(twin), 0
    for n in [*range(0, count - 12, 61), *range(count - 12, count)]:
        failed += fails(n, weighting.refresh)
        now = book_of(weighting)
        is_before = torch.equal(now["book"]["measured"], before["book"]["measured"]) and len(
            now["measurements"]
        ) == len(before["measurements"])
        for name in ("phi", "direction", "reference", "generator") if is_before else ("phi",):
            same_book(now[name], (before if is_before else after)[name])
        weighting.load_state_dict(before)
    assert failed > 5
    weighting.refresh()
    same_book(book_of(weighting)["book"], after["book"])
