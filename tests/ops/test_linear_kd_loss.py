"""linear_kd_loss in eager code: against its definition, in all its options; what it keeps in memory."""

import importlib
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from kdaif_fast.ops import _linear_chunks, linear_kd_loss
from tests.ops.linear_kd_loss_cases import (
    ALPHA,
    DIFFERENTIABLE,
    IGNORED,
    T,
    double,
    expected,
    leaves,
    needs_kernels,
    ours,
    problem,
    relative_error,
)

linear_kd_loss_module = importlib.import_module("kdaif_fast.ops.linear_kd_loss")  # the name is the function's
CLOSE = dict(rtol=1e-10, atol=1e-12)


def check(arguments, *names, upstream=None, **options):
    """Value and gradients of what is named against the definition's."""
    arguments, wanted = leaves(arguments, *names)
    results = []
    for formula in (ours, expected):
        loss = formula(**options, **arguments)
        g = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape) if upstream is None else upstream
        results.append((loss, *torch.autograd.grad(loss, wanted, g, materialize_grads=True)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


class TestReference:
    def test_is_the_textbook_formula(self):
        x = problem(weight=False, ignored=())
        student = x["hidden"] @ x["head_weight"].T + x["head_bias"]
        teacher = x["teacher"] @ x["teacher_head"].T + x["teacher_bias"]
        p, log_q = (teacher / T).softmax(-1), (student / T).log_softmax(-1)
        ce = F.cross_entropy(student, x["labels"])
        kl = F.kl_div(log_q, p, reduction="batchmean")
        torch.testing.assert_close(expected(**x), ALPHA * ce + (1 - ALPHA) * T**2 * kl)

    def test_mean_is_that_of_cross_entropy(self):
        """Over the rows that are not ignored."""
        x = problem(weight=False)
        student = x["hidden"] @ x["head_weight"].T + x["head_bias"]
        torch.testing.assert_close(expected(alpha=1.0, **x), F.cross_entropy(student, x["labels"]))


class TestValuesAndGradients:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("chunk_rows", [1, 2, 3, 4, 5, 7, 100, None])
    def test_chunks_that_do_not_divide(self, reduction, chunk_rows):
        check(problem(), reduction=reduction, chunk_rows=chunk_rows)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("teacher_head", [True, False])
    @pytest.mark.parametrize("weight", [True, False])
    @pytest.mark.parametrize("ignored", [(), (1, 4)])
    def test_with_and_without_what_is_optional(self, reduction, bias, teacher_head, weight, ignored):
        x = problem(bias=bias, teacher_head=teacher_head, weight=weight, ignored=ignored)
        check(x, reduction=reduction, chunk_rows=3)
        check(x, "hidden", "head_weight", "head_bias", reduction=reduction, chunk_rows=3)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    def test_one_gradient_alone(self, name, reduction):
        """A frozen head, frozen hidden states, and so on."""
        check(problem(), name, reduction=reduction, chunk_rows=2)

    @pytest.mark.parametrize("temperature", [1.0, 0.5, 2.5])
    @pytest.mark.parametrize("alpha", [0.0, 1.0])
    @pytest.mark.parametrize("reduction", ["sum", "none"])
    def test_settings(self, temperature, alpha, reduction):
        check(problem(), temperature=temperature, alpha=alpha, reduction=reduction, chunk_rows=3)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_no_rows(self, reduction):
        check(problem(N=0), reduction=reduction)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_all_rows_ignored(self, reduction):
        x = problem(N=3, ignored=(0, 1, 2))
        check(x, reduction=reduction)
        arguments, wanted = leaves(x)
        loss = ours(reduction=reduction, **arguments).sum()
        assert loss == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, wanted))

    @pytest.mark.parametrize("create_graph", [False, True])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_what_ignored_rows_hold_does_not_matter(self, reduction, create_graph):
        x = problem()
        arguments, wanted = leaves(x)
        clean = torch.autograd.grad(ours(reduction, **arguments).sum(), wanted)
        for name in ("hidden", "teacher", "weight"):
            x[name][1] = math.nan
        arguments, wanted = leaves(x)
        loss = ours(reduction, **arguments).sum()
        assert loss.isfinite()
        for a, b in zip(torch.autograd.grad(loss, wanted, create_graph=create_graph), clean, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)

    def test_batch_axes_and_an_ignore_index_of_ones_own(self):
        x = problem(N=6)
        x["labels"] = x["labels"].masked_fill(x["labels"] == IGNORED, 0)
        flat = linear_kd_loss(**x, reduction="none", ignore_index=0)
        assert (flat == 0).sum() >= 2
        rows = {k: v.view(2, 3, *v.shape[1:]) for k, v in x.items() if k in ("hidden", "teacher", "weight", "labels")}
        torch.testing.assert_close(linear_kd_loss(**(x | rows), reduction="none", ignore_index=0), flat.view(2, 3))

    def test_rows_that_are_not_contiguous(self):
        x = problem(N=6)
        x["hidden"], x["teacher"] = x["hidden"].T.contiguous().T, x["teacher"].repeat(1, 2)[:, :3]
        x["head_weight"] = x["head_weight"].T.contiguous().T
        x["weight"] = x["weight"][:1].expand(6)
        check(x, chunk_rows=4)

    def test_inputs_stay_as_they_are(self):
        for teacher_head in (True, False):
            x = problem(teacher_head=teacher_head, ignored=())  # no row is copied to leave others out
            before = {k: v.clone() for k, v in x.items()}
            check(x, chunk_rows=3)
            arguments, _ = leaves(x)
            ours(**arguments).backward()
            assert all(torch.equal(arguments[k].detach(), before[k]) for k in x)

    def test_tied_embeddings(self):
        """Hidden states that depend on the head: a gradient and its derivative must not count that path twice."""
        head = problem()["head_weight"].requires_grad_()
        x = problem()
        results = []
        for formula in (ours, expected):
            loss = formula(**(x | {"hidden": head[:7].sin(), "head_weight": head}))
            (gradient,) = torch.autograd.grad(loss, head, create_graph=True)
            results.append((gradient, torch.autograd.grad(gradient.sin().sum(), head)[0]))
        torch.testing.assert_close(*results, **CLOSE)


class TestAutograd:
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_gradcheck(self, reduction):
        arguments, wanted = leaves(problem(N=3, V=4, D=2, E=2, ignored=(1,)))
        names = [name for name in DIFFERENTIABLE if name in arguments]

        def function(*tensors):
            return ours(reduction, chunk_rows=2, **(arguments | dict(zip(names, tensors, strict=True))))

        assert gradcheck(function, wanted, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, wanted)

    @pytest.mark.parametrize("factor", [1.0, 0.37])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_backward_twice(self, reduction, factor):
        arguments, wanted = leaves(problem())
        loss = ours(reduction, **arguments).sum() * factor
        once = [g.clone() for g in torch.autograd.grad(loss, wanted, retain_graph=True)]
        for a, b in zip(torch.autograd.grad(loss, wanted, retain_graph=True), once, strict=True):
            assert torch.equal(a, b)
        loss.backward(retain_graph=True)
        loss.backward()
        for x, b in zip(wanted, once, strict=True):
            assert torch.equal(x.grad, 2 * b)

    def test_no_gradient_is_formed_when_nobody_needs_it(self, monkeypatch):
        monkeypatch.setattr(_linear_chunks, "row_divergence_with_grad", lambda *a: pytest.fail("a gradient was formed"))
        arguments, _ = leaves(problem())
        with torch.no_grad():
            assert not ours(**arguments).requires_grad
        assert not ours(**problem()).requires_grad
        ours("none", **arguments)
        ours(**leaves(problem(), "weight")[0])
        with pytest.raises(pytest.fail.Exception):
            ours(**arguments)

    def test_nothing_is_recomputed_in_the_backward_pass(self, monkeypatch):
        loss = ours(**leaves(problem())[0])
        monkeypatch.setattr(_linear_chunks, "row_divergence_with_grad", lambda *a: pytest.fail("formed again"))
        loss.backward()

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_tensors_of_inference_mode(self, reduction):
        x = problem()
        with torch.inference_mode():
            given = {k: v.clone() for k, v in x.items() if "head" not in k}
        heads = {k: v for k, v in x.items() if "head" in k and k != "head_weight"}
        head = x["head_weight"].requires_grad_()
        loss = ours(reduction, head_weight=head, **given, **heads).sum()
        (right,) = torch.autograd.grad(expected(reduction, **(x | {"head_weight": head})).sum(), head)
        (gradient,) = torch.autograd.grad(loss, head, create_graph=True)
        torch.testing.assert_close(gradient, right, **CLOSE)
        (first,) = torch.autograd.grad(ours(reduction, head_weight=head, **given, **heads).sum(), head)
        torch.testing.assert_close(first, right, **CLOSE)
        with torch.inference_mode():
            torch.testing.assert_close(ours(reduction, head_weight=head, **given, **heads).sum(), loss.detach())

    def test_a_module_around_it_trains(self):
        x = problem(N=8, dtype=torch.float32, ignored=())
        model, head = torch.nn.Linear(5, 5), torch.nn.Linear(5, 11)
        optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = linear_kd_loss(
                model(x["hidden"]), head.weight, x["teacher"], x["labels"],
                head_bias=head.bias, teacher_head=x["teacher_head"], temperature=T,
            )  # fmt: skip
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]


# Relative error (2-norm) of gradients: that of rounding the result, twice at most.
GRADIENT_ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def as_on_a_gpu(monkeypatch):
    """Products of low precision have float32 results, and nothing asks which rows are ignored."""
    monkeypatch.setattr(linear_kd_loss_module, "chooses_rows", lambda labels: False)
    monkeypatch.setattr(
        _linear_chunks, "multiplies_low_precision", lambda x, head: x.dtype == head.dtype and x.itemsize == 2
    )
    monkeypatch.setattr(_linear_chunks, "wide_product", lambda a, b, out=None: torch.mm(a.float(), b.float(), out=out))


class TestLowPrecision:
    @pytest.mark.parametrize("dtype", GRADIENT_ERROR)
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("units", [False, True])
    def test_is_as_good_as_its_dtype(self, dtype, reduction, units, monkeypatch):
        """units: with products as on a GPU, where matrix units take low precision and give float32."""
        if units and dtype != torch.float32:
            monkeypatch.setattr(_linear_chunks, "multiplies_low_precision", lambda x, head: x.dtype == head.dtype)
            monkeypatch.setattr(
                _linear_chunks, "wide_product", lambda a, b, out=None: torch.mm(a.float(), b.float(), out=out)
            )
        monkeypatch.setattr(_linear_chunks, "_WIDENED", 64 * 20)  # several parts
        x = problem(N=50, D=20, V=300, E=10, dtype=dtype)
        x["weight"].abs_()  # no cancellation in the mean
        arguments, wanted = leaves(x)
        exact, exact_wanted = leaves(double(x))
        loss, right = ours(reduction, chunk_rows=16, **arguments), expected(reduction, **exact)
        assert loss.dtype == torch.float32
        assert relative_error(loss, right) < 1e-5
        upstream = torch.linspace(0.5, 2, loss.numel()).view(loss.shape)
        gradients = torch.autograd.grad(loss, wanted, upstream)
        for g, x, exact_g in zip(
            gradients, wanted, torch.autograd.grad(right, exact_wanted, upstream.double()), strict=True
        ):
            assert g.dtype == x.dtype
            assert relative_error(g, exact_g) < (GRADIENT_ERROR[dtype] if x.dtype == dtype else 1e-5) * (
                2 if units else 1
            )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("teacher_head", [True, False])
    @pytest.mark.parametrize("parts", [True, False])
    def test_as_on_a_gpu(self, dtype, teacher_head, parts, monkeypatch):
        """Ignored rows stay, as zeros, and the gradient takes the logits' place, whatever those rows hold."""
        as_on_a_gpu(monkeypatch)
        monkeypatch.setattr(_linear_chunks, "_WIDENED", 64 if parts else 1 << 20)
        x = problem(N=50, D=20, V=300, E=10, dtype=dtype, bias=False, teacher_head=teacher_head, ignored=(0, 7, 49))
        x["weight"].abs_()
        exact, exact_wanted = leaves(double(x), "hidden", "head_weight", "weight")
        right = expected(**exact)
        for name in ("hidden", "teacher", "weight"):
            x[name][[0, 7, 49]] = torch.nan
        arguments, wanted = leaves(x, "hidden", "head_weight", "weight")
        loss = ours(chunk_rows=16, **arguments)
        assert relative_error(loss, right) < 1e-5
        exact_gradients = torch.autograd.grad(right, exact_wanted, torch.tensor(0.5).double())
        gradients = torch.autograd.grad(loss, wanted, torch.tensor(0.5))
        for g, y, exact_g in zip(gradients, wanted, exact_gradients, strict=True):
            assert g.dtype == y.dtype
            assert relative_error(g, exact_g) < (2 * GRADIENT_ERROR[dtype] if y.dtype == dtype else 1e-5)

    @pytest.mark.parametrize("reduction", ["none", "sum"])
    def test_in_full_as_on_a_gpu(self, reduction, monkeypatch):
        as_on_a_gpu(monkeypatch)
        x = problem()
        arguments, wanted = leaves(x)
        exact, exact_wanted = leaves(x)
        loss, right = ours(reduction, chunk_rows=3, **arguments), expected(reduction, **exact)
        torch.testing.assert_close(loss, right, **CLOSE)
        upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        for g, e in zip(
            torch.autograd.grad(loss, wanted, upstream),
            torch.autograd.grad(right, exact_wanted, upstream),
            strict=True,
        ):
            torch.testing.assert_close(g, e, **CLOSE)

    def test_nothing_is_looked_at_on_a_gpu(self, monkeypatch):
        as_on_a_gpu(monkeypatch)
        monkeypatch.setattr(torch.Tensor, "nonzero", lambda *a: pytest.fail("waits for a GPU"))
        x = problem()
        options = _linear_chunks.Options(T, ALPHA, 3, IGNORED)
        call = linear_kd_loss_module._Call(x["labels"], "mean", IGNORED, options)
        rows = linear_kd_loss_module._Rows(linear_kd_loss_module._Inputs(*[x[name] for name in DIFFERENTIABLE]), call)
        torch.testing.assert_close(rows.reduced(rows.run(None)), expected(**problem()), **CLOSE)

    @pytest.mark.parametrize("units", [False, True])
    def test_loss_scaling_reaches_small_gradients(self, units, monkeypatch):
        """What is below float16's smallest number before a GradScaler's factor is not zero after it."""
        if units:
            monkeypatch.setattr(_linear_chunks, "multiplies_low_precision", lambda x, head: x.dtype == head.dtype)
            monkeypatch.setattr(
                _linear_chunks, "wide_product", lambda a, b, out=None: torch.mm(a.float(), b.float(), out=out)
            )
        x = problem(N=10, V=50, dtype=torch.float16, weight=False)
        weight = torch.full((10,), 1e-8)
        arguments, wanted = leaves(x, "hidden", "head_weight")
        gradients = torch.autograd.grad(ours(weight=weight, **arguments) * 2.0**20, wanted)
        exact, exact_wanted = leaves(double(x), "hidden", "head_weight")
        right = torch.autograd.grad(expected(weight=weight.double(), **exact) * 2.0**20, exact_wanted)
        for a, b in zip(gradients, right, strict=True):
            assert relative_error(a, b) < 3e-3

    def test_rounded_logits_would_not_pass(self):
        """Why logits stay float32: near its teacher, the student's gradient is a small difference."""
        x = problem(N=40, D=64, V=500, dtype=torch.bfloat16, bias=False, teacher_head=False, ignored=(), weight=False)
        logits = x["hidden"].double() @ x["head_weight"].double().T
        x["teacher"] = (logits + 0.1 * x["teacher"].double()).float()
        arguments, wanted = leaves(x, "hidden")
        (gradient,) = torch.autograd.grad(ours(alpha=0.0, **arguments), wanted)
        exact, exact_wanted = leaves(double(x), "hidden")
        (right,) = torch.autograd.grad(expected(alpha=0.0, **exact), exact_wanted)
        assert relative_error(gradient, right) < 4e-3
        rounded = (x["hidden"] @ x["head_weight"].T).double().requires_grad_()
        loss = expected(alpha=0.0, **(double(x) | {"hidden": rounded, "head_weight": torch.eye(500).double()}))
        (g,) = torch.autograd.grad(loss, rounded)
        assert relative_error(g @ x["head_weight"].double(), right) > 0.02

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("mixed", [False, True])
    def test_autocast(self, reduction, mixed):
        """bfloat16 hidden states beside float32 heads, as autocast makes them; logits are not rounded for it."""
        x = problem(N=20, D=8, V=30, dtype=torch.float32)
        if mixed:
            x["hidden"] = x["hidden"].bfloat16()
        arguments, wanted = leaves(x)
        exact, exact_wanted = leaves(double(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = ours(reduction, **arguments)
            inside = torch.autograd.grad(loss.sum(), wanted, retain_graph=True)
            graph = torch.autograd.grad(loss.sum(), wanted, create_graph=True)
        right = expected(reduction, **exact)
        assert relative_error(loss, right) < 1e-6
        outside = torch.autograd.grad(loss.sum(), wanted)
        for *all_of_one, b in zip(inside, outside, graph, torch.autograd.grad(right.sum(), exact_wanted), strict=True):
            for a in all_of_one:
                assert relative_error(a, b) < GRADIENT_ERROR[a.dtype]

    def test_double_and_single_together(self):
        x = problem(dtype=torch.float32)
        x["teacher"] = x["teacher"].double()
        loss = ours(**x)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, expected(**double(x)), **CLOSE)


def peak(function):
    """Bytes of torch's allocations at the worst moment of a call, above those at its beginning."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del result
    return most


class TestMemory:
    N, D, E, V, ROWS = 200, 8, 6, 2000, 40
    CHUNK = ROWS * V * 4

    def problem(self, **options):
        return problem(self.N, self.D, self.V, self.E, **({"dtype": torch.float32, "ignored": (3,)} | options))

    @needs_kernels
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("teacher_head", [True, False])
    def test_at_most_two_chunks(self, reduction, dtype, teacher_head, monkeypatch):
        monkeypatch.setattr(_linear_chunks, "_WIDENED", 1000)
        x = self.problem(dtype=dtype, teacher_head=teacher_head)
        arguments, wanted = leaves(x, "hidden", "head_weight", "head_bias", "weight")

        def step():
            return torch.autograd.grad(ours(reduction, chunk_rows=self.ROWS, **arguments).sum(), wanted)

        step()
        outputs = sum(x.numel() for x in wanted) * 4 + (sum(x.nbytes for x in wanted) if dtype != torch.float32 else 0)
        small = self.CHUNK // 10  # hidden states of a chunk, losses, labels
        assert self.CHUNK < peak(step) <= 2 * self.CHUNK + outputs + small
        assert 2 * self.CHUNK + outputs + small < self.N * self.V * 4  # else the test could not tell

    @needs_kernels
    def test_less_without_a_gradient(self):
        x = self.problem()
        with torch.no_grad():
            assert peak(lambda: ours(chunk_rows=self.ROWS, **x)) <= 1.6 * self.CHUNK

    @needs_kernels
    def test_with_a_teacher_that_wants_a_gradient(self):
        arguments, wanted = leaves(self.problem())
        outputs = sum(x.nbytes for x in wanted)
        step = lambda: torch.autograd.grad(ours(chunk_rows=self.ROWS, **arguments), wanted)  # noqa: E731
        assert peak(step) <= 2.1 * self.CHUNK + outputs

    def test_default_chunks(self):
        cpu, cuda = torch.device("cpu"), torch.device("cuda")
        rows = [_linear_chunks.default_chunk_rows(V, cpu) for V in (2, 1000, 32000, 128256, 10**6)]
        assert rows == [1024, 1024, 262, 65, 64]
        assert _linear_chunks.default_chunk_rows(32000, cuda) == 4096
