"""A plain PyTorch loop, before and after the five lines that weigh its samples: digits, 30 % with wrong labels.

python examples/plain_pytorch.py
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kdaif_fast.demo.data import load_digits
from kdaif_fast.distill import InfluenceWeighting, with_indices


def train_before(model, train, epochs):
    loader = DataLoader(train, batch_size=64, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def train_after(model, train, epochs, val):
    loader = DataLoader(train, batch_size=64, shuffle=True)
    loader = with_indices(loader)  # 1: batches become (indices, batch)
    weighting = InfluenceWeighting(model, loader, val)  # 2: val has labels that can be trusted
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for epoch in range(epochs):
        weighting.start_epoch(epoch)  # 3: measures the influence of every sample on the validation loss
        for indices, (x, y) in loader:  # 4
            loss = (weighting(indices) * F.cross_entropy(model(x), y, reduction="none")).mean()  # 5
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weighting


def main(epochs=15):
    torch.manual_seed(0)
    digits = load_digits(flip=0.3, seed=0)
    train, val = TensorDataset(digits.train_x, digits.train_y), (digits.val_x, digits.val_y)
    first = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    second = copy.deepcopy(first)
    train_before(first, train, epochs)
    weighting = train_after(second, train, epochs, val)

    accuracy = {
        name: (model(digits.test_x).argmax(1) == digits.test_y).double().mean().item()
        for name, model in (("unweighted", first), ("weighted", second))
    }
    weights, flipped = weighting.weights, digits.flipped
    print(f"test accuracy: {accuracy['unweighted']:.1%} unweighted, {accuracy['weighted']:.1%} weighted")
    print(f"mean weight: {weights[~flipped].mean():.2f} of right labels, {weights[flipped].mean():.2f} of wrong ones")
    return accuracy, weights, flipped


if __name__ == "__main__":
    main()
