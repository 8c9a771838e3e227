"""DistributedDataParallel with weighted samples: digits, 30 % with wrong labels, shared out over processes.

    torchrun --standalone --nproc_per_node 2 examples/distributed.py

With group="world" every process measures its own share of the samples, and the direction that influence is along, and
so the weights, are those that one process with all samples would find. Here refresh="step": one pass over a batch gives
losses, influence, weights and weighted gradients, which DistributedDataParallel averages over the processes as always.
"""

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from kdaif_fast.demo.data import load_digits
from kdaif_fast.distill import InfluenceWeighting, with_indices


def main(epochs=15):
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    digits = load_digits(flip=0.3, seed=0)
    train, val = TensorDataset(digits.train_x, digits.train_y), TensorDataset(digits.val_x, digits.val_y)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    sampler = DistributedSampler(train)
    train_loader = with_indices(DataLoader(train, batch_size=32, sampler=sampler))
    val_loader = DataLoader(val, batch_size=100, sampler=DistributedSampler(val, shuffle=False))
    weighting = InfluenceWeighting(model, train_loader, val_loader, refresh="step", group="world")

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        weighting.start_epoch(epoch)  # all processes together
        for indices, batch in train_loader:
            optimizer.zero_grad()
            weighting.step(batch, indices)  # forward pass, influence, weights, backward pass
            optimizer.step()
    weighting.gather()  # what the steps of all processes have measured

    weights, flipped = weighting.weights, digits.flipped
    accuracy = (model(digits.test_x).argmax(1) == digits.test_y).double().mean().item()
    if distributed.get_rank() == 0:
        print(f"test accuracy: {accuracy:.1%}")
        right, wrong = weights[~flipped].mean(), weights[flipped].mean()
        print(f"mean weight: {right:.2f} of right labels, {wrong:.2f} of wrong ones")
    distributed.destroy_process_group()
    return accuracy, weights, flipped


if __name__ == "__main__":
    main()
