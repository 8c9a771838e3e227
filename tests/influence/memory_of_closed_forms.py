"""Prints the peak memory of every score that needs no iterative solve, for a short and a long loader, in MiB."""

import json
import sys
import tempfile

import torch
from torch import nn

import kdaif_fast

SHORT, LONG, SIZE = 2, 16, 32


class Loader:
    """Batches that are made when they are asked for, the same in each pass."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        for seed in range(self.count):
            generator = torch.Generator().manual_seed(seed)
            yield torch.randn(SIZE, 256, generator=generator), torch.randint(10, (SIZE,), generator=generator)


class Inverse:
    """What EKFAC offers, without its cost."""

    @staticmethod
    def solve(b, damping):
        return b / damping


def main(path):
    sys.path.insert(0, path)
    from peak_memory import peak_mib

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 10))
    val = next(iter(Loader(1)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"queries": "per_class"}
    calls = {
        "tracin": lambda data: kdaif_fast.tracin_scores(model, data, val, checkpoints=[state, state], **options),
        "datainf": lambda data: kdaif_fast.datainf_scores(model, data, val, **options),
        "datainf, one query": lambda data: kdaif_fast.datainf_scores(model, data, val),
        "factored": lambda data: kdaif_fast.projected_scores(model, data, val, dims=16, **options),
        "dense": lambda data: kdaif_fast.projected_scores(model, data, val, method="dense", dims=16, **options),
        "in a file": lambda data: kdaif_fast.ProjectedGradients(
            model, data, dims=1024, folder=tempfile.mkdtemp(dir=folder)
        ),
        "identity": lambda data: kdaif_fast.self_influence(model, data),
        "operator": lambda data: kdaif_fast.self_influence(
            model, data, curvature=Inverse, damping=1.0, memory=16 << 20
        ),
    }
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, call in calls.items():
            short, long = (peak_mib(lambda: call(Loader(n)), lambda: call(Loader(1))) for n in (SHORT, LONG))  # noqa: B023
            peaks[name] = short, long
    gradients = LONG * SIZE * sum(p.numel() for p in model.parameters()) * 4 / 2**20
    print(json.dumps({"peaks": peaks, "gradients": gradients}))


if __name__ == "__main__":
    main(sys.argv[1])
