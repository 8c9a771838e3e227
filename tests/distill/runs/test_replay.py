"""Epochs that are entered in their middle: training goes on bit by bit, from whatever step."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from kdaif_fast.distill.runs.checkpoint import read_state, write_state
from kdaif_fast.distill.runs.random_states import random_state, set_random_state
from kdaif_fast.distill.runs.replay import EpochReplay

SAMPLES, BATCH, EPOCHS = 10, 3, 2


@pytest.fixture(autouse=True)
def generators_and_threads_as_before():
    before, threads = random_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    set_random_state(before)


class Augmented(Dataset):
    """Samples with noise from all three global generators."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        noise = torch.rand(4) + np.random.normal() + random.random()
        return i, torch.linspace(i, 1, 4) / 10 + noise


class OwnNoise(Augmented):
    """Noise from generators of its own."""

    def __init__(self):
        self.torch, self.random = torch.Generator().manual_seed(3), random.Random(3)
        self.numpy, self.legacy = np.random.default_rng(3), np.random.RandomState(3)

    def __getitem__(self, i):
        noise = torch.rand(4, generator=self.torch) + self.numpy.normal() + self.legacy.normal() + self.random.random()
        return i, torch.linspace(i, 1, 4) / 10 + noise


class Flip:
    def __init__(self):
        self.rng = np.random.default_rng(4)

    def __call__(self, x):
        return x * self.rng.choice([-1.0, 1.0])

    def collate(self, samples):
        indices, inputs = torch.utils.data.default_collate(samples)
        return indices, self(inputs)


class Transformed(Augmented):
    def __init__(self):
        self.transform = nn.Sequential()  # an object with the attribute that compositions of transforms have
        self.transform.transforms = [Flip(), Flip()]

    def __getitem__(self, i):
        index, x = super().__getitem__(i)
        for transform in self.transform.transforms:
            x = transform(x)
        return index, x


class NumpyOrder(Sampler):
    def __init__(self):
        self.rng = np.random.Generator(np.random.Philox(2))  # whose state holds arrays

    def __iter__(self):
        for _ in range(SAMPLES):
            yield int(self.rng.integers(SAMPLES))

    def __len__(self):
        return SAMPLES


class PythonBatches(Sampler):
    """A batch sampler that draws each batch when it is asked for."""

    def __init__(self):
        self.rng = random.Random(1)

    def __iter__(self):
        for _ in range(4):
            yield [self.rng.randrange(SAMPLES) for _ in range(self.rng.randint(1, 3))]

    def __len__(self):
        return 4


class Counting(Sampler):
    """Another order at every pass, from a seed that nobody finds; it says where it is itself."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.passes)).tolist())

    def __len__(self):
        return SAMPLES

    def state_dict(self):
        return {"passes": self.passes}

    def load_state_dict(self, state):
        self.passes = state["passes"]


class Stateful:
    """A loader of another kind that finds its place itself."""

    def __init__(self):
        self.order, self.at = None, 0

    def __iter__(self):
        if self.order is None:
            self.order, self.at = torch.randperm(4).tolist(), 0
        while self.at < 4:
            self.at += 1
            yield torch.tensor([self.order[self.at - 1]]), torch.rand(2, 4)
        self.order = None

    def __len__(self):
        return 4

    def state_dict(self):
        return {"order": self.order, "at": self.at}

    def load_state_dict(self, state):
        self.order, self.at = state["order"], state["at"]


class StatefulDataLoader(DataLoader):
    """As torchdata's: its state brings back its order and place, not what its data set draws."""

    def state_dict(self):
        raise AssertionError("a DataLoader is replayed")

    load_state_dict = state_dict


def generator():
    return torch.Generator().manual_seed(7)


def weighted(**options):
    return WeightedRandomSampler(torch.linspace(1, 2, SAMPLES), SAMPLES, **options)


def loader(dataset=Augmented, **options):
    return lambda workers: DataLoader(
        dataset(), **{"batch_size": BATCH, **options}, num_workers=workers, persistent_workers=False
    )


def fresh(make):
    """A maker whose samplers and generators are new every time, as in a new process."""
    return lambda workers: make()(workers)


LOADERS = {
    "in order": loader(),
    "shuffle": loader(shuffle=True),
    "generator": fresh(lambda: loader(shuffle=True, generator=generator())),
    "drop last": loader(shuffle=True, drop_last=True),
    "weighted": fresh(lambda: loader(sampler=weighted())),
    "weighted, generator": fresh(lambda: loader(sampler=weighted(generator=generator()))),
    "drawn as it goes": fresh(
        lambda: loader(
            sampler=RandomSampler(range(SAMPLES), replacement=True, num_samples=70, generator=generator()),
            batch_size=12,
        )
    ),
    "subset": fresh(lambda: loader(sampler=SubsetRandomSampler(range(3, SAMPLES)))),
    "batch sampler": fresh(lambda: loader(batch_size=1, batch_sampler=BatchSampler(weighted(), 4, drop_last=False))),
    "distributed": fresh(lambda: loader(sampler=DistributedSampler(Augmented(), num_replicas=2, rank=1), batch_size=2)),
    "numpy in the sampler": fresh(lambda: loader(sampler=NumpyOrder())),
    "random in the batch sampler": fresh(lambda: loader(batch_size=1, batch_sampler=PythonBatches())),
    "sampler with a state": fresh(lambda: loader(sampler=Counting())),
    "generators in the data": loader(OwnNoise, shuffle=True),
    "generators in a subset": fresh(lambda: loader(lambda: Subset(ConcatDataset([OwnNoise(), OwnNoise()]), range(7)))),
    "generators in transforms": loader(Transformed, shuffle=True),
    "generator in collate_fn": fresh(lambda: loader(collate_fn=Flip().collate)),
}
OTHERS = {
    "list": lambda workers: [(torch.tensor([i]), torch.full((2, 4), i / 4)) for i in range(4)],
    "loader with a state": lambda workers: Stateful(),
    "DataLoader with a state": lambda workers: StatefulDataLoader(Augmented(), BATCH, shuffle=True),
}


class Run:
    """A toy training: dropout, momentum, and all that a trainer does with a replay."""

    def __init__(self, batches, passes=False):
        self.replay, self.passes = EpochReplay(batches), passes
        torch.manual_seed(11)
        np.random.seed(11)
        random.seed(11)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)
        self.epoch, self.seen = 0, []

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random_state(),
            "replay": self.replay.state(),
            "epoch": self.epoch,
            "seen": [list(indices) for indices in self.seen],
        }

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.seen = state["epoch"], [list(indices) for indices in state["seen"]]

    def train(self, checkpoint=None, note=lambda: None):
        if checkpoint is not None:
            self.load(checkpoint)
            if not self.replay.restore(checkpoint["replay"]):
                set_random_state(checkpoint["random"])
                checkpoint = None
        while self.epoch < EPOCHS:
            if hasattr(getattr(self.replay.loader, "sampler", None), "set_epoch"):
                self.replay.loader.sampler.set_epoch(self.epoch)
            if checkpoint is not None:
                batches = self.replay.resume(checkpoint["replay"], then=checkpoint["random"])
                checkpoint = None
            else:
                self.look_at_all()
                batches = self.replay.start()
            for indices, inputs in batches:
                self.seen.append(indices.tolist())
                self.optimizer.zero_grad()
                self.model(inputs).square().mean().backward()
                self.optimizer.step()
                random.random(), np.random.rand()
                if self.replay.given == 2:
                    self.look_at_all()
                note()
            self.epoch += 1
            note()
        return self

    def look_at_all(self):
        """As a measurement of influence does, between epochs and within."""
        if self.passes:
            for _ in self.replay.loader:
                pass


def check(make, tmp_path, workers=0, passes=False, at=None):
    """From every step of a run (or those in `at`) a new one goes on with the same batches, to the same bits."""
    checkpoints = []
    whole = Run(make(workers), passes)
    whole.train(note=lambda: checkpoints.append(copy.deepcopy(whole.state())))
    end = whole.state()
    assert len({tuple(map(tuple, point["seen"])) for point in checkpoints}) > 5
    for point in checkpoints if at is None else [checkpoints[i] for i in at]:
        write_state(tmp_path / "state.safetensors", point)
        torch.manual_seed(random.getrandbits(30)), np.random.seed(1), random.seed(len(point["seen"]))
        resumed = Run(make(workers), passes).train(read_state(tmp_path / "state.safetensors"))
        now = resumed.state()
        assert resumed.seen == whole.seen
        for name, value in end["model"].items():
            assert torch.equal(now["model"][name], value), f"{name} after {len(point['seen'])} steps"
        assert torch.equal(now["random"]["torch"], end["random"]["torch"])
        assert now["random"]["python"] == end["random"]["python"]
        assert np.array_equal(now["random"]["numpy"]["state"]["key"], end["random"]["numpy"]["state"]["key"])
        assert now["random"]["numpy"]["state"]["pos"] == end["random"]["numpy"]["state"]["pos"]


class TestGoesOnBitByBit:
    @pytest.fixture(autouse=True)
    def safetensors(self):
        pytest.importorskip("safetensors")

    @pytest.mark.parametrize("name", [*LOADERS, *OTHERS])
    def test_at_every_step(self, tmp_path, name):
        check({**LOADERS, **OTHERS}[name], tmp_path)

    @pytest.mark.parametrize("name", ["shuffle", "generator", "random in the batch sampler", "list"])
    def test_with_passes_over_the_loader_meanwhile(self, tmp_path, name):
        check({**LOADERS, **OTHERS}[name], tmp_path, passes=True)

    @pytest.mark.parametrize("name", ["generator", "drawn as it goes"])
    def test_with_workers(self, tmp_path, name):
        check(LOADERS[name], tmp_path, workers=2, at=[0, 2, 3, -4])

    @pytest.mark.slow
    @pytest.mark.parametrize("name", LOADERS)
    def test_with_workers_at_every_step(self, tmp_path, name):
        check(LOADERS[name], tmp_path, workers=2)

    def test_with_workers_that_persist(self, tmp_path):
        def make(workers):
            return DataLoader(Augmented(), 3, shuffle=True, num_workers=workers, persistent_workers=True)

        check(make, tmp_path, workers=2, at=[1, 4, 6])


def drawn(batches, count):
    return [next(batches)[0].tolist() for _ in range(count)]


class TestOtherData:
    """What is refused is no loader of the run that was checkpointed."""

    def state_after(self, batches, count):
        replay = EpochReplay(batches)
        drawn(replay.start(), count)
        return replay.state()

    def test_fewer_batches_than_given_out(self):
        class Unsized:
            def __init__(self, count):
                self.count = count

            def __iter__(self):
                return iter([(torch.tensor([i]),) for i in range(self.count)])

        state = self.state_after(Unsized(5), 4)
        assert drawn(EpochReplay(Unsized(5)).resume(state), 1) == [[4]]
        with pytest.raises(ValueError, match="loader gave 3 batches, but 4 had been given out"):
            EpochReplay(Unsized(3)).resume(state)

    def test_another_number_of_batches(self):
        state = self.state_after(DataLoader(Augmented(), 3), 1)
        with pytest.raises(ValueError, match="loader has 5 batches, but had 4"):
            EpochReplay(DataLoader(Augmented(), 2)).resume(state)

    def test_another_first_batch(self):
        state = self.state_after(DataLoader(Augmented(), 3, shuffle=True), 2)
        before = random_state()
        with pytest.raises(ValueError, match="another first batch"):
            EpochReplay(DataLoader(Augmented(), 3)).resume(state)
        assert torch.equal(random_state()["torch"], before["torch"])
        assert random_state()["python"] == before["python"]
        halves = [(torch.tensor([0, 1]), torch.rand(2))] * 2
        state = self.state_after(halves, 1)
        changed = [(torch.tensor([0, 1]), torch.rand(2))] * 2  # augmented otherwise, or rounded on another machine
        assert len(list(EpochReplay(changed).resume(state))) == 1

    def test_another_epoch_of_the_sampler(self):
        def make():
            sampler = DistributedSampler(Augmented(), num_replicas=2, rank=0)
            return DataLoader(Augmented(), 2, sampler=sampler)

        whole = make()
        whole.sampler.set_epoch(3)
        state = self.state_after(whole, 1)
        with pytest.raises(ValueError, match=r"loader\.sampler is at epoch 0, but was at 3 .* call its set_epoch\(3\)"):
            EpochReplay(make()).resume(state)

    def test_what_has_no_state_is_let_be(self):
        data = Augmented()
        data.transform = random.Random  # a class, not a generator
        data.secret = random.SystemRandom()
        state = self.state_after(DataLoader(data, 3), 1)
        assert state["now"] == {}

    def test_other_generators(self):
        state = self.state_after(DataLoader(Augmented(), 3, shuffle=True, generator=generator()), 1)
        for call in (EpochReplay.restore, EpochReplay.resume):
            with pytest.raises(ValueError, match=r"generators \[\], but had \['loader.generator', 'loader.sampler.gen"):
                call(EpochReplay(DataLoader(Augmented(), 3, shuffle=True)), state)

    def test_a_state_of_its_own_in_one_run_only(self):
        state = self.state_after(Stateful(), 1)
        with pytest.raises(ValueError, match="state_dict in only one"):
            EpochReplay([(torch.tensor([0]),)] * 4).resume(state)

    @pytest.mark.parametrize("value", [iter([1]), (i for i in range(3)), 3, None])
    def test_no_loader(self, value):
        with pytest.raises(TypeError, match=r"loader is a .*, expected something that can be gone through again"):
            EpochReplay(value)


class TestPlace:
    def test_where_it_is(self):
        replay = EpochReplay([(torch.tensor([i]),) for i in range(3)])
        assert (replay.state()["start"], replay.state()["given"]) == (None, 0)
        batches = replay.start()
        assert (replay.state()["start"] is None, replay.state()["given"]) == (False, 0)
        for number, _ in enumerate(batches, 1):
            assert replay.state()["given"] == number
        assert (replay.state()["start"], replay.state()["given"]) == (None, 0)

    def test_an_epoch_that_was_left_can_be_entered_again(self):
        data = [(torch.tensor([i]),) for i in range(4)]
        replay = EpochReplay(data)
        for (index,) in replay.start():
            if index == 1:
                break
        state = replay.state()
        assert [index.item() for (index,) in EpochReplay(data).resume(state)] == [2, 3]

    def test_before_the_first_batch_and_after_the_last(self):
        data = DataLoader(Augmented(), 3, shuffle=True)
        replay = EpochReplay(data)
        batches = replay.start()
        before = replay.state(), random_state()
        order = drawn(batches, 4)
        after = replay.state(), random_state()
        torch.rand(5)
        assert drawn(EpochReplay(data).resume(before[0], then=before[1]), 4) == order
        again = EpochReplay(data)
        assert list(again.resume(after[0], then=after[1])) == []
        assert again.state()["start"] is None

    def test_a_resumed_epoch_can_be_checkpointed(self):
        data = DataLoader(Augmented(), 2, shuffle=True)
        start = EpochReplay(data)
        batches = start.start()
        order = drawn(batches, 1)
        first = start.state()
        order += drawn(batches, 4)
        second = EpochReplay(data)
        assert drawn(second.resume(first), 2) == order[1:3]
        assert drawn(EpochReplay(data).resume(second.state()), 2) == order[3:]

    def test_without_states_the_generators_are_left_to_the_caller(self):
        data = DataLoader(Augmented(), 3, shuffle=True)
        replay = EpochReplay(data)
        drawn(replay.start(), 2)
        state, states = replay.state(), random_state()
        EpochReplay(data).resume(state, then=states)
        assert torch.equal(random_state()["torch"], states["torch"])

    def test_the_loader_keeps_its_persistent_iterator_to_itself(self):
        data = DataLoader(Augmented(), 3, num_workers=1, persistent_workers=True)
        batches = EpochReplay(data).start()
        first = drawn(batches, 1)
        assert len(list(data)) == 4  # a second pass meanwhile
        assert first + drawn(batches, 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
