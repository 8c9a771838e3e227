"""Trees in a file: what comes back, kills, full disks, and files of others."""

import copy
import errno
import json
import math
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from collections import Counter, OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kdaif_fast
from kdaif_fast import _files
from kdaif_fast.distill.runs.checkpoint import CheckpointError, read_state, write_state

safetensors = pytest.importorskip("safetensors")
safe_open, save_file = safetensors.safe_open, pytest.importorskip("safetensors.torch").save_file


def there_and_back(tmp_path, state):
    write_state(tmp_path / "state.safetensors", state)
    return read_state(tmp_path / "state.safetensors")


def assert_same(a, b):
    """The same types, dtypes and bits all through two trees."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert [(type(key), key) for key in a] == [(type(key), key) for key in b]
        assert vars(a) == vars(b) if isinstance(a, OrderedDict) else True
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert bits(a) == bits(b)
    elif isinstance(a, (np.ndarray, np.generic)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, float):
        assert struct.pack(">d", a) == struct.pack(">d", b)
    else:
        assert a == b


def bits(tensor):
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).tolist()


NAN_WITH_A_MESSAGE = struct.unpack(">d", bytes.fromhex("7ff8000000000123"))[0]


class TestValues:
    def test_plain(self, tmp_path):
        state = {
            "none": None,
            "bools": [True, False],
            "ints": (0, -1, 2**100),
            "floats": [0.1, -0.0, 5e-324, math.inf, -math.inf, math.nan, NAN_WITH_A_MESSAGE],
            "strings": ["", "é\0\n\"'", "\udc80"],
            "bytes": b"\0\xff",
            "complex": complex(-0.0, math.inf),
            "empty": [[], (), {}],
            "torch": [torch.Size([2, 3]), torch.bfloat16, torch.device("cuda", 1)],
            "dicts": [OrderedDict([("b", 1), ("a", (2,))]), Counter({30: 2, 80: 1})],
            0: {1: "int", "1": "str", 1.5: "float", None: "none", (1, "a", ()): "tuple", -math.inf: "inf"},
            True and "tags": {"tensor": "no", "tuple": [1], "float": "x"},
        }
        assert_same(there_and_back(tmp_path, state), state)

    @pytest.mark.parametrize("state", [None, 3, "a", [], torch.arange(3), {"": {"": torch.ones(1)}}])
    def test_any_tree(self, tmp_path, state):
        assert_same(there_and_back(tmp_path, state), state)
        with safe_open(tmp_path / "state.safetensors", "pt") as file:
            assert file.keys()  # a file without a tensor is none to the first versions of safetensors

    def test_numbers_and_arrays_of_numpy(self, tmp_path):
        fixed = np.arange(3)
        fixed.flags.writeable = False
        state = {
            "numbers": [np.float64(0.1), np.float32(np.nan), np.int8(-1), np.bool_(True), np.complex64(1 - 2j)],
            "arrays": [
                np.arange(6, dtype=">u2").reshape(2, 3),
                np.array(2.5),
                np.zeros((0, 3)),
                fixed,
                np.eye(3)[:, 1],
            ],
            np.int64(3): np.array([True, False]),
        }
        assert_same(there_and_back(tmp_path, state), state)

    @pytest.mark.parametrize(
        "value",
        [
            *(object(), len, lambda epoch: epoch, {1}, range(3), Path("a"), np.array([None]), np.datetime64("2020")),
            *(namedtuple("Pair", "a b")(1, 2), torch.Generator(), np.array(["a"]), nn.Linear(1, 1)),
            *(torch.eye(2).to_sparse(), torch.empty(2, device="meta")),
            torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
            torch.ones(2).as_subclass(type("Own", (torch.Tensor,), {})),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_what_cannot_be_stored_is_named(self, tmp_path, value):
        path = tmp_path / "state.safetensors"
        with pytest.raises(TypeError, match=r"state\['scheduler'\]\[1\]\[0\] is a .*, expected "):
            write_state(path, {"a": torch.ones(2), "scheduler": [0, (value,)]})
        assert list(tmp_path.iterdir()) == []

    def test_keys_that_cannot_be_stored_are_named(self, tmp_path):
        with pytest.raises(TypeError, match=r"state\['a'\] has the key <object"):
            write_state(tmp_path / "state.safetensors", {"a": {object(): 1}})

    def test_functions_of_a_scheduler_are_named(self, tmp_path):
        class Decay:
            def __init__(self):
                self.rule = lambda epoch: 0.9**epoch

            def __call__(self, epoch):
                return self.rule(epoch)

        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
        state = torch.optim.lr_scheduler.LambdaLR(optimizer, Decay()).state_dict()
        with pytest.raises(TypeError, match=r"state\['scheduler'\]\['lr_lambdas'\]\[0\]\['rule'\] is a .*function"):
            write_state(tmp_path / "state.safetensors", {"scheduler": state})

    def test_too_many_plain_values(self, tmp_path, monkeypatch):
        monkeypatch.setattr("kdaif_fast.distill.runs.checkpoint._LARGEST_STRUCTURE", 1000)
        with pytest.raises(ValueError, match="put long lists of numbers into tensors"):
            write_state(tmp_path / "state.safetensors", list(range(1000)))


class TestTensors:
    @pytest.mark.parametrize(
        "dtype",
        [
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2fnuz),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
            *(torch.bool, torch.complex32, torch.complex64, torch.complex128),
        ],
    )
    @pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0, 3)])
    @pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
    def test_dtypes_and_shapes(self, tmp_path, dtype, shape):
        size = math.prod(shape) * dtype.itemsize
        highest = 1 if dtype == torch.bool else 255  # every bit pattern, NaN of all kinds among them
        raw = torch.randint(highest + 1, (max(size, 16),), dtype=torch.uint8)
        state = [raw[:size].view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)]
        assert_same(there_and_back(tmp_path, state), state)

    def test_memory_that_is_not_contiguous(self, tmp_path):
        base = torch.randn(4, 6, 2, 3)
        complex_ = torch.randn(3, 4, dtype=torch.complex128)
        state = {
            "channels last": base.to(memory_format=torch.channels_last),
            "transposed": torch.randn(5, 3).t(),
            "complex, transposed": complex_.t(),
            "complex": complex_,
            "conjugate": complex_.conj(),
            "negative": complex_.conj().imag,
            "dropped": base[:, ::2],
            "expanded": torch.randn(3, 1).expand(3, 4),
            "of bytes, transposed": torch.ones(2, 3, dtype=torch.uint16).t(),
        }
        read = there_and_back(tmp_path, state)
        assert_same(read, state)
        for name in ("channels last", "transposed", "complex, transposed", "of bytes, transposed"):
            assert read[name].stride() == state[name].stride()

    def test_tied_and_overlapping(self, tmp_path):
        model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
        model[1].weight = model[0].weight
        line = torch.arange(10.0)
        array = np.arange(4.0)
        state = {
            "model": model.state_dict(),
            "views": [line, line[2:5], line.view(2, 5), line[:0], line[8:], line],
            "halves": line.clone().split(5),
            "both": [array, torch.from_numpy(array)],
        }
        read = there_and_back(tmp_path, state)
        assert_same(read, state)
        assert read["model"]["0.weight"] is read["model"]["1.weight"]
        assert read["views"][0] is read["views"][-1]
        addresses = {tensor.untyped_storage().data_ptr() for tensor in read["views"][:3]}
        assert len(addresses) == 3
        # Only once on the disk.
        assert os.path.getsize(tmp_path / "state.safetensors") < 4096

    def test_parameters_come_back_as_tensors(self, tmp_path):
        read = there_and_back(tmp_path, nn.Parameter(torch.ones(2)))
        assert type(read) is torch.Tensor
        assert not read.requires_grad

    def test_names_are_places_and_never_clash(self, tmp_path):
        state = {"student": {"0.weight": torch.ones(2)}, "a": {"b/c": torch.ones(1)}, "a/b": {"c": torch.zeros(1)}}
        state["__metadata__"] = torch.ones(3)
        assert_same(there_and_back(tmp_path, state), state)
        with safe_open(tmp_path / "state.safetensors", "pt") as file:
            assert torch.equal(file.get_tensor("student/0.weight"), torch.ones(2))
            assert len(file.keys()) == 4

    def test_memory_of_their_own(self, tmp_path):
        """Aligned as any tensor's, and not mapped from a file that may be replaced."""
        path = tmp_path / "state.safetensors"
        write_state(path, [torch.ones(1), torch.ones(33), torch.ones(1 << 20)])
        read = read_state(path)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in read)
        assert str(path) not in Path("/proc/self/maps").read_text()

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_cuda(self, tmp_path):
        state = {"a": torch.randn(3, 4, device="cuda"), "b": torch.randn(4, 3, device="cuda").t()}
        state["c"] = state["a"]
        read = there_and_back(tmp_path, state)
        assert_same(read, {key: value.cpu() for key, value in state.items()})
        assert read["a"] is read["c"]


MEMORY = """
import sys, torch
from kdaif_fast.distill.runs.checkpoint import write_state
def kilobytes(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0])
tensors = [torch.ones(1 << 20, 4).t(), *(torch.ones(1 << 20) for _ in range(16))]  # 16 MB, and 16 times 4
write_state(sys.argv[1], tensors[-1])
open("/proc/self/clear_refs", "w").write("5")  # the highest from now on
before = kilobytes("VmRSS")
write_state(sys.argv[1], {"student": tensors})
print(kilobytes("VmHWM") - before)
"""


def test_saving_does_not_copy(tmp_path):
    done = run(MEMORY, tmp_path / "state.safetensors")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1024 * 16  # kB; the state has 80 MB


class Versioned(nn.Module):
    """A module whose state needs its version: without it, it is taken for an old one."""

    _version = 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.extra = {"seen": 5}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        assert local_metadata.get("version") == 3
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def model_of(seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(1, 4, 3).to(memory_format=torch.channels_last)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4, 3, dtype=torch.float32), Versioned())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
    "tensor rate": lambda p: torch.optim.Adam(p, torch.tensor(1e-3)),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3),
    "groups": lambda p: torch.optim.RMSprop(
        [{"params": [q], "lr": 0.01 * i} for i, q in enumerate(p, 1)], centered=True
    ),
}
RATES = torch.optim.lr_scheduler
SCHEDULERS = {
    "step": lambda o: RATES.StepLR(o, 2),
    "multi step": lambda o: RATES.MultiStepLR(o, [2, 3, 3]),
    "lambda": lambda o: RATES.LambdaLR(o, lambda epoch: 0.9**epoch),
    "one cycle": lambda o: RATES.OneCycleLR(o, 0.1, 20),
    "warm restarts": lambda o: RATES.CosineAnnealingWarmRestarts(o, 3),
    "plateau": lambda o: RATES.ReduceLROnPlateau(o, patience=0),
    "sequence": lambda o: RATES.SequentialLR(o, [RATES.LinearLR(o), RATES.ExponentialLR(o, 0.9)], [2]),
    "chain": lambda o: RATES.ChainedScheduler([RATES.ConstantLR(o), RATES.PolynomialLR(o)]),
}


def steps(model, optimizer, scheduler, count):
    for _ in range(count):
        x, y = torch.randn(6, 1, 4, 4), torch.randint(3, (6,))

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model[:4](x) * model[4].scale.sum(), y)  # noqa: B023
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        if isinstance(scheduler, RATES.ReduceLROnPlateau):
            scheduler.step(loss.detach())
        else:
            scheduler.step()


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [*((name, "step") for name in OPTIMIZERS), *(("sgd", name) for name in SCHEDULERS)],
)
def test_training_goes_on_bit_by_bit(tmp_path, optimizer, scheduler):
    torch.set_num_threads(1)

    def begin(seed):
        model = model_of(seed)[0:5]
        made = OPTIMIZERS[optimizer](list(model.parameters()))
        return model, made, SCHEDULERS[scheduler](made)

    def state(parts):
        return {name: part.state_dict() for name, part in zip(("model", "optimizer", "scheduler"), parts, strict=True)}

    whole = begin(0)
    whole[0][4].extra = {"seen": (1, torch.ones(2))}
    torch.manual_seed(1)
    steps(*whole, 3)
    read = there_and_back(tmp_path, state(whole))
    assert_same(read, state(whole))
    random_state = torch.get_rng_state()
    steps(*whole, 3)

    resumed = begin(5)
    for part, name in zip(resumed, ("model", "optimizer", "scheduler"), strict=True):
        part.load_state_dict(read[name])
    torch.set_rng_state(random_state)
    steps(*resumed, 3)
    assert_same(state(resumed), state(whole))


class TestFilesOfOthers:
    def refused(self, path, message):
        before = path.read_bytes()
        with pytest.raises(CheckpointError, match=message) as error:
            read_state(path)
        assert str(path) in str(error.value)
        assert path.read_bytes() == before

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_state(tmp_path / "no.safetensors")
        with pytest.raises(IsADirectoryError):
            read_state(tmp_path)

    def test_cut_short_anywhere(self, tmp_path):
        path = tmp_path / "state.safetensors"
        write_state(path, {"a": torch.randn(100), "b": [torch.randn(100), 1]})
        whole = path.read_bytes()
        for size in sorted({0, 1, 7, 8, 9, 20, 200, *range(0, len(whole), 97), len(whole) - 1}):
            path.write_bytes(whole[:size])
            self.refused(path, "is empty" if not size else "is no .safetensors file" if size < 9 else "is cut short")
        path.write_bytes(whole + b"\0")
        self.refused(path, "cut short or damaged")

    def test_other_kinds_of_files(self, tmp_path):
        path = tmp_path / "state.safetensors"
        torch.save({"a": torch.ones(2)}, path)
        self.refused(path, "is a zip archive, as torch.save makes them")
        path.write_text("epoch,step\n1,2\n")
        self.refused(path, "is no .safetensors file")
        save_file({name: torch.ones(1) for name in "abcd"}, path, {"format": "pt"})
        self.refused(path, r"with 4 tensors \('a', 'b', 'c', ...\) that write_state has not made")
        save_file({}, path)
        self.refused(path, r"with 0 tensors \(\)")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "2"}, "has the format '2', expected '1'"),
            ({"structure": "{"}, "is damaged: its structure cannot be read"),
            ({"structure": '{"tensor":"b"}'}, "is damaged: .*'b'"),
            ({"structure": '{"pickle":"a"}'}, "'pickle' is not known"),
            ({"structure": '{"dtype":"save"}'}, "'save' is no dtype"),
            ({"structure": '{"number":["|O8","0000000000000000"]}'}, "no dtype of numbers"),
            ({"structure": "{}"}, "is damaged"),
            ({"structure": "[" * 100_000}, "is damaged"),
            ({"structure": '{"dict":[[{"dict":[]},1]]}'}, "is damaged"),
        ],
    )
    def test_damaged_structures(self, tmp_path, change, message):
        path = tmp_path / "state.safetensors"
        write_state(path, {"a": torch.ones(2)})
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({"a": torch.ones(2)}, path, {**metadata, **change})
        self.refused(path, message)

    def test_where_nothing_can_be_written(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="is no folder"):
            write_state(tmp_path / "no" / "state.safetensors", 1)
        with pytest.raises(IsADirectoryError, match="which is a folder"):
            write_state(tmp_path, 1)
        with pytest.raises(OSError, match="/proc"):
            write_state("/proc/state.safetensors", 1)


class TestWrites:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "state.safetensors"
        write_state(path, {"version": 0})
        yield path
        # The one before, with nothing beside it; and the next save works.
        assert read_state(path) == {"version": 0}
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
        write_state(path, {"version": 1, "tensor": torch.ones(2)})
        assert read_state(path)["version"] == 1

    def test_a_disk_that_is_full(self, path):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(OSError, match="could not be written") as error:
                write_state(path, {"version": 1, "tensor": torch.ones(100_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert error.value.errno == errno.EFBIG
        assert error.value.filename == str(path)

    @pytest.mark.parametrize(
        ("message", "number"),
        [
            ("Error while serializing: I/O error: No space left on device (os error 28)", errno.ENOSPC),
            ('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "" })', errno.ENOSPC),
            ("something else", errno.EIO),
        ],
    )
    def test_how_safetensors_says_it(self, path, monkeypatch, message, number):
        def full(tensors, filename, metadata):
            Path(filename).write_bytes(b"half")
            Path(filename).with_name(".tmp1234").write_bytes(b"half")
            raise safetensors.SafetensorError(message)

        with monkeypatch.context() as patch:
            patch.setattr("safetensors.torch.save_file", full)
            with pytest.raises(OSError, match="could not be written") as error:
                write_state(path, {"version": 1})
        assert error.value.errno == number

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_a_disk_that_is_full_late(self, path, monkeypatch, call):
        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            if call == "fsync":
                patch.setattr(_files.os, "fsync", full)
            else:
                patch.setattr(Path, "replace", full)
            with pytest.raises(OSError, match="No space left"):
                write_state(path, {"version": 1})

    def test_what_a_kill_has_left_is_gone_before_anything_is_written(self, path, monkeypatch):
        left_over = path.with_name(f".{path.name}.part")
        left_over.mkdir()
        (left_over / ".tmpAbCdEf").write_bytes(b"half")

        def save(tensors, filename, metadata):
            assert [file.name for file in left_over.iterdir()] == [path.name]
            save_file(tensors, filename, metadata)

        monkeypatch.setattr("safetensors.torch.save_file", save)
        write_state(path, {"version": 0})

    def test_an_interrupt(self, path, monkeypatch):
        def stopped(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("safetensors.torch.save_file", stopped)
            with pytest.raises(KeyboardInterrupt):
                write_state(path, {"version": 1})

    def test_links_and_modes_stay(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "elsewhere").mkdir()
        link = tmp_path / "elsewhere" / "last.safetensors"
        link.symlink_to(path)
        write_state(link, {"version": 0})
        assert link.is_symlink()
        assert list(link.parent.iterdir()) == [link]
        (tmp_path / "plain").touch()
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
        (tmp_path / "plain").unlink()
        link.unlink()
        link.parent.rmdir()
        write_state(path.name, {"version": 0})  # a name without a folder

    def test_the_data_reach_the_disk_before_the_name(self, path, monkeypatch):
        order = []
        sync, replace = os.fsync, Path.replace
        monkeypatch.setattr(_files.os, "fsync", lambda number: order.append(named(number)) or sync(number))
        monkeypatch.setattr(Path, "replace", lambda a, b: order.append("replace") or replace(a, b))
        write_state(path, {"version": 0})
        assert order == [path.name, "replace", path.parent.name]


def named(number):
    return Path(os.readlink(f"/proc/self/fd/{number}")).name


SAVES = """
import sys, torch
from kdaif_fast.distill.runs.checkpoint import write_state
torch.set_num_threads(1)
version = int(sys.argv[2])
while True:
    version += 1
    write_state(sys.argv[1], {"version": version, "tensors": [torch.full((1 << 16,), version) for _ in range(8)]})
    print(version, flush=True)
"""


def environment():
    package = str(Path(kdaif_fast.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}


def run(code, *args):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False, env=environment()
    )


def test_kills_while_saving(tmp_path):
    """Whenever a process is killed, the file is whole, and that of its last save or of the one it was at."""
    path = tmp_path / "state.safetensors"
    version, draw = 0, random.Random(0)
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", SAVES, str(path), str(version)], stdout=subprocess.PIPE, text=True, env=environment()
        ) as process:
            try:
                process.stdout.readline()
                assert process.poll() is None
                # Stopped at many moments, then killed at one: starting Python takes most of the time.
                for _ in range(12):
                    time.sleep(draw.uniform(0, 0.02))
                    process.send_signal(signal.SIGSTOP)
                    assert_whole(path, version)
                    process.send_signal(signal.SIGCONT)
                time.sleep(draw.uniform(0, 0.02))
            finally:  # also when an assertion fails: a stopped process would be waited for
                process.kill()
            said = [int(line) for line in process.stdout]
        at = assert_whole(path, version)
        assert at - (said[-1] if said else version + 1) in (0, 1)
        version = at
    # A kill in the middle of a write, for certain.
    (tmp_path / f".{path.name}.part").mkdir(exist_ok=True)
    (tmp_path / f".{path.name}.part" / ".tmpAbCdEf").write_bytes(b"half")
    assert_whole(path, version - 1)
    write_state(path, {"version": -1})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def assert_whole(path, after):
    """The version in the file, which is whole, and not one from before `after`."""
    state = read_state(path)
    assert state["version"] > after - 1
    assert len(state["tensors"]) == 8
    for tensor in state["tensors"]:
        assert torch.equal(tensor, torch.full((1 << 16,), state["version"]))
    return state["version"]


def test_what_others_see(tmp_path):
    """Any reader of the format finds the tensors, and JSON in the metadata."""
    write_state(tmp_path / "state.safetensors", {"student": {"0.weight": torch.ones(2)}, "epoch": 3})
    with safe_open(tmp_path / "state.safetensors", "np") as file:
        assert file.get_tensor("student/0.weight").tolist() == [1, 1]
        metadata = file.metadata()
    assert (metadata["kind"], metadata["format"]) == ("state of kdaif_fast", "1")
    assert json.loads(metadata["structure"])["dict"][1] == ["epoch", 3]


def test_the_state_is_not_changed_by_writing_it(tmp_path):
    state = {"a": torch.randn(3, 2).t(), "b": [np.arange(3), (1.5, None)]}
    before = copy.deepcopy(state)
    write_state(tmp_path / "state.safetensors", state)
    assert_same(state, before)
    assert state["a"].stride() == before["a"].stride()
