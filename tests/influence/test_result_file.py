"""Scores in files: their formats, and runs that were killed and go on."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kdaif_fast
from kdaif_fast import influence_scores
from kdaif_fast.influence.array_files import ArrayFile
from kdaif_fast.influence.fingerprint import describe, digest
from kdaif_fast.influence.result_file import ResultFile
from tests.cases import make
from tests.influence.test_streaming import pieces

OPTIONS = {"damping": 0.1, "tol": 1e-8}


def beside(path, end):
    return path.with_name(path.name + end)


class TestArrayFile:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("shape", [(5,), (5, 3), (1, 1)])
    @pytest.mark.parametrize("end", [".npy", ".safetensors"])
    def test_others_can_read_it(self, tmp_path, end, shape, dtype):
        path = tmp_path / f"phi{end}"
        made = ArrayFile.create(path, shape, dtype)
        assert np.isnan(made.values).all()
        values = torch.randn(shape, dtype=dtype)
        made.values[:] = values.numpy()
        made.flush()
        if end == ".npy":
            read = torch.from_numpy(np.load(path))
        else:
            load_file = pytest.importorskip("safetensors.numpy").load_file
            read = torch.from_numpy(load_file(path)["phi"])
        assert torch.equal(read, values)
        assert read.dtype == dtype
        again = ArrayFile.open(path, "c").values
        assert np.array_equal(again, values.numpy())
        again[:] = 0  # copies on writing
        assert np.array_equal(ArrayFile.open(path).values, values.numpy())

    def test_the_layout_of_safetensors(self, tmp_path):
        """Its public description: eight bytes of length, JSON, data; nothing after them."""
        path = tmp_path / "phi.safetensors"
        ArrayFile.create(path, (5, 3), torch.float32).flush()
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        assert header["phi"] == {"dtype": "F32", "shape": [5, 3], "data_offsets": [0, 60]}
        assert all(isinstance(value, str) for value in header["__metadata__"].values())
        assert len(raw) == 8 + length + 60
        assert (8 + length) % 8 == 0

    def test_no_room_is_said_at_once_and_nothing_is_left(self, tmp_path):
        path = tmp_path / "phi.npy"
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(OSError, match="out needs 400,128 bytes, but"):
                ArrayFile.create(path, (100_000,), torch.float32)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert not path.exists()


class TestOut:
    @pytest.mark.parametrize("queries", ["mean", "per_class"])
    @pytest.mark.parametrize("end", [".npy", ".safetensors"])
    @pytest.mark.parametrize("size", [5, None])
    def test_the_same_as_in_memory(self, tmp_path, size, end, queries):
        model, batch, val = make("mlp")
        train = batch if size is None else pieces(batch, size)
        path = tmp_path / f"phi{end}"
        phi, solution = influence_scores(model, train, val, queries=queries, return_solution=True, **OPTIONS)
        mapped = influence_scores(model, train, val, queries=queries, out=path, **OPTIONS)
        assert torch.equal(mapped, phi)
        assert np.array_equal(ArrayFile.open(path).values, phi.numpy())
        assert np.array_equal(np.load(beside(path, ".solution.npy")), solution.x.numpy())
        # All is there: nothing is computed, and the report of the solve is the same.
        again, report = influence_scores(
            Unusable(model), train, val, queries=queries, out=str(path), return_solution=True, **OPTIONS
        )
        assert torch.equal(again, phi)
        assert torch.equal(torch.as_tensor(report.residual), torch.as_tensor(solution.residual))
        assert report[2:6] == solution[2:6]

    def test_float32(self, tmp_path):
        model, batch, val = make("mlp")
        train, val = [(x.float(), y) for x, y in pieces(batch, 5)], (val[0].float(), val[1])
        phi = influence_scores(model.float(), train, val, out=tmp_path / "phi.npy", damping=0.1)
        assert phi.dtype == torch.float32
        assert torch.equal(phi, influence_scores(model, train, val, damping=0.1))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"damping": 0.2}, "damping was 0.1 and is 0.2"),
            ({"tol": 1e-7}, "tol was 1e-08 and is 1e-07"),
            ({"queries": "per_class"}, "queries was 'mean' and is 'per_class'"),
            ({"loss": lambda z, y: z.square().sum(1)}, "loss was None and is 'tests.influence.test_result_file"),
            ({"params": ["2"]}, "parameters that influence is over was"),
            ({"solver_options": {"stop_every": 2}}, "solver_options was None"),
        ],
    )
    def test_other_settings_are_not_mixed_in(self, tmp_path, change, message):
        model, batch, val = make("mlp")
        path = tmp_path / "phi.npy"
        influence_scores(model, pieces(batch, 5), val, out=path, **OPTIONS)
        before = path.read_bytes()
        with pytest.raises(ValueError, match=f"begun with other settings: .*{message}.*resume=False"):
            influence_scores(model, pieces(batch, 5), val, out=path, **{**OPTIONS, **change})
        assert path.read_bytes() == before
        fresh = influence_scores(model, pieces(batch, 5), val, out=path, resume=False, **{**OPTIONS, **change})
        assert torch.equal(fresh, influence_scores(model, pieces(batch, 5), val, **{**OPTIONS, **change}))

    def test_another_model_or_other_data_are_not_mixed_in(self, tmp_path):
        model, batch, val = make("mlp")
        path = tmp_path / "phi.npy"
        train = pieces(batch, 5)
        influence_scores(model, train, val, out=path, **OPTIONS)
        with pytest.raises(ValueError, match="batch: samples of the first batch was 5 and is 4"):
            influence_scores(model, pieces(batch, 4), val, out=path, **OPTIONS)
        with pytest.raises(ValueError, match="val: values was"):
            influence_scores(model, train, (val[0] + 1, val[1]), out=path, **OPTIONS)
        with pytest.raises(ValueError, match="batch: number of samples was 12 and is 10"):
            influence_scores(model, train[:2], val, out=path, **OPTIONS)
        corrected = batch[0], torch.cat([batch[1][:-1], (batch[1][-1:] + 1) % 3])
        with pytest.raises(ValueError, match="batch: values was"):
            influence_scores(model, pieces(corrected, 5), val, out=path, **OPTIONS)
        other = nn.Sequential(model[0], nn.ReLU(), *model[2:])
        with pytest.raises(ValueError, match="layers of the model was"):
            influence_scores(other, train, val, out=path, **OPTIONS)
        with torch.no_grad():
            model[0].weight[0, 0] += 1
        with pytest.raises(ValueError, match="values of the model was"):
            influence_scores(model, train, val, out=path, **OPTIONS)

    def test_an_unfinished_solve_binds_nobody(self, tmp_path):
        model, batch, val = make("mlp")
        path = tmp_path / "phi.npy"
        with pytest.raises(kdaif_fast.solvers.ConvergenceError):
            influence_scores(model, pieces(batch, 5), val, out=path, damping=1e-6, max_iter=2, strict=True)
        phi = influence_scores(model, pieces(batch, 5), val, out=path, **OPTIONS)
        assert torch.equal(phi, influence_scores(model, pieces(batch, 5), val, **OPTIONS))

    def test_strict_does_not_take_over_what_was_not(self, tmp_path):
        model, batch, val = make("mlp")
        options = {"damping": 1e-6, "max_iter": 2, "out": tmp_path / "phi.npy"}
        with pytest.warns(kdaif_fast.ConvergenceWarning):
            influence_scores(model, batch, val, **options)
        with pytest.raises(kdaif_fast.solvers.ConvergenceError, match="begun with a solution that had not converged"):
            influence_scores(model, batch, val, strict=True, **options)

        # Nothing was asked of a fixed number of products.
        options = {"damping": 1e-6, "max_iter": 2, "tol": None, "strict": True, "out": tmp_path / "fixed.npy"}
        assert torch.equal(
            influence_scores(model, batch, val, **options), influence_scores(model, batch, val, **options)
        )

    def test_files_of_others_are_left_alone(self, tmp_path):
        model, batch, val = make("mlp")
        path = tmp_path / "phi.npy"
        path.write_text("mine")
        with pytest.raises(ValueError, match=r"which exists.*resume=False"):
            influence_scores(model, batch, val, out=path)
        assert path.read_text() == "mine"
        beside(path, ".progress.json").write_text("[]")
        with pytest.raises(ValueError, match="no record of this library"):
            influence_scores(model, batch, val, out=path)
        influence_scores(model, batch, val, out=path, resume=False)
        assert len(np.load(path)) == 12

    def test_a_solution_that_was_changed(self, tmp_path):
        model, batch, val = make("mlp")
        path = tmp_path / "phi.npy"
        influence_scores(model, batch, val, out=path)
        np.save(beside(path, ".solution.npy"), np.zeros(3))
        with pytest.raises(ValueError, match=r"is not the solution that phi\.npy\.progress\.json is about"):
            influence_scores(model, batch, val, out=path)

    def test_scores_that_were_deleted_are_made_again(self, tmp_path):
        model, batch, val = make("mlp")
        path = tmp_path / "phi.npy"
        phi = influence_scores(model, pieces(batch, 5), val, out=path).clone()
        path.unlink()
        assert torch.equal(influence_scores(model, pieces(batch, 5), val, out=path), phi)

    def test_scores_of_before_stay_when_their_file_is_written_anew(self, tmp_path):
        model, batch, val = make("mlp")
        before = influence_scores(model, batch, val, out=tmp_path / "phi.npy", **OPTIONS)
        expected = before.clone()
        again = influence_scores(model, batch, val, out=tmp_path / "phi.npy", resume=False, damping=1.0)
        assert torch.equal(before, expected)
        assert not torch.equal(again, expected)

    def test_where_nothing_can_be_written(self, tmp_path):
        model, batch, val = make("mlp")
        for out, error in (
            (tmp_path / "no" / "phi.npy", FileNotFoundError),
            (Path("/proc/phi.npy"), OSError),
        ):
            with pytest.raises(error, match="out "):
                influence_scores(Unusable(model), batch, val, out=out)
        (tmp_path / "folder.npy").mkdir()
        with pytest.raises(IsADirectoryError, match="which is a folder"):
            influence_scores(Unusable(model), pieces(batch, 5), val, out=tmp_path / "folder.npy")


class Unusable(nn.Module):
    """Has a model's parameters and buffers under their own names, and cannot be run on several batches."""

    def __new__(cls, model):
        changed = type("Unusable", (type(model),), {"forward": cls._run, "runs": 0})
        copy = model.__class__.__new__(changed)
        copy.__dict__.update(model.__dict__)
        return copy

    def _run(self, *arguments):
        self.runs += 1
        # One batch is linearised when the operator is made.
        assert self.runs == 1, "the model was run"
        return nn.Sequential.forward(self, *arguments)


def test_descriptions_have_no_addresses():
    from functools import partial

    assert describe(partial(torch.sum, dim=1)) == describe(partial(torch.sum, dim=1))
    assert describe(object()) == "builtins.object"
    assert "0x" not in json.dumps(describe([nn.Linear(2, 2), describe, {"a": (1, None)}, torch.ones(3)]))
    assert describe(kdaif_fast.DistillationLoss(2.0)) != describe(kdaif_fast.DistillationLoss())


class Smoothed:
    """A loss with a setting."""

    def __init__(self, smoothing):
        self._smoothing = smoothing

    def __call__(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=self._smoothing)


def test_losses_of_one_name_with_other_settings_differ():
    def around(smoothing):
        return lambda z, y: Smoothed(smoothing)(z, y)

    def constant(first):
        return (lambda z, y: z.sum(1) * 2.0) if first else (lambda z, y: z.sum(1) * 3.0)

    def module(smoothing):
        return nn.CrossEntropyLoss(reduction="none", label_smoothing=smoothing)

    for make_loss, a, b in (
        (Smoothed, 0.0, 0.1),
        (around, 0.0, 0.1),
        (constant, True, False),
        (module, 0.0, 0.1),
        (lambda s: Smoothed(s).__call__, 0.0, 0.1),
        (lambda s: nn.CrossEntropyLoss(torch.full((3,), s)), 1.0, 2.0),
        (lambda s: {"preconditioner": Smoothed(s)}, 0.0, 0.1),
    ):
        assert describe(make_loss(a)) == describe(make_loss(a))
        assert describe(make_loss(a)) != describe(make_loss(b))
    loop = Smoothed(0.1)
    loop.itself = [loop]
    assert "0x" not in str(describe(loop))


def test_digests_tell_values_shapes_and_dtypes_apart():
    x = torch.arange(4.0)
    others = [x + 1, x.view(2, 2), x.double(), -x, x[:3]]
    assert len({digest([y]) for y in [x, x.clone(), *others]}) == 1 + len(others)
    assert digest([x.to(torch.bfloat16)]) == digest([x.to(torch.bfloat16)])
    assert digest([x[::2]]) == digest([torch.tensor([0.0, 2.0])])


SCRIPT = """
import os, signal, sys, torch
import kdaif_fast
from kdaif_fast.influence import result_file
result_file.SECONDS_BETWEEN_RECORDS = 0.0  # the small batches of a test are done in no time
torch.set_num_threads(1)
torch.manual_seed(0)
out, queries, kill_in = sys.argv[1], sys.argv[2], int(sys.argv[3])
train_runs = 0
class Model(torch.nn.Sequential):
    def forward(self, x):
        global train_runs
        if len(x) == 4:  # a batch of train; those of val are smaller
            train_runs += 1
            if train_runs == kill_in:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
model = Model(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
train = [(torch.randn(4, 5), torch.randint(3, (4,))) for _ in range(12)]
val = torch.randn(3, 5), torch.tensor([0, 1, 2])
phi = kdaif_fast.influence_scores(model, train, val, damping=0.1, queries=queries, tol=None, max_iter=6, out=out)
print(train_runs)
"""


def run(out, queries, kill_in=0):
    package = str(Path(kdaif_fast.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out), queries, str(kill_in)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.mark.parametrize(("queries", "end"), [("mean", ".npy"), ("per_class", ".safetensors")])
def test_a_killed_run_goes_on_where_it_was(tmp_path, queries, end):
    whole = run(tmp_path / f"whole{end}", queries)
    assert whole.returncode == 0, whole.stderr
    runs = int(whole.stdout)
    expected = ArrayFile.open(tmp_path / f"whole{end}").values
    killed = tmp_path / f"killed{end}"
    # In the middle of the scores: the last 12 runs are theirs.
    assert run(killed, queries, kill_in=runs - 5).returncode == -signal.SIGKILL
    done = json.loads(beside(killed, ".progress.json").read_text())["done"]
    scored = ArrayFile.open(killed).values
    assert done == 6 * 4
    assert np.array_equal(scored[:done], expected[:done])
    assert np.isnan(scored[done:]).all()
    resumed = run(killed, queries)
    assert resumed.returncode == 0, resumed.stderr
    assert int(resumed.stdout) == 6  # neither the solve nor the first batches
    assert ArrayFile.open(killed).values.tobytes() == expected.tobytes()


def test_a_run_that_was_killed_in_its_solve_starts_over(tmp_path):
    assert run(tmp_path / "phi.npy", "mean", kill_in=20).returncode == -signal.SIGKILL
    again = run(tmp_path / "phi.npy", "mean")
    assert again.returncode == 0, again.stderr
    assert not np.isnan(np.load(tmp_path / "phi.npy")).any()


def test_more_samples_than_room(tmp_path):
    file = ResultFile(tmp_path / "phi.npy", {})
    file.allocate(3, None, torch.float32)
    with pytest.raises(ValueError, match="more samples than the 3"):
        file.write(torch.ones(4, 1))
