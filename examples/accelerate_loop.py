"""Accelerate with weighted samples: digits, 30 % with wrong labels, on whatever accelerate is configured for.

    python examples/accelerate_loop.py
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py

It needs no adapter. Three things to know: with_indices comes before prepare; the weighting is made of what prepare
returns; and with several processes it is told that they are a group.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kdaif_fast.demo.data import load_digits
from kdaif_fast.distill import InfluenceWeighting, with_indices


def main(epochs=15, cpu=True):
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    digits = load_digits(flip=0.3, seed=0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    train = DataLoader(TensorDataset(digits.train_x, digits.train_y), batch_size=32, shuffle=True)
    val = DataLoader(TensorDataset(digits.val_x, digits.val_y), batch_size=100)  # labels that can be trusted
    model, optimizer, train, val = accelerator.prepare(model, optimizer, with_indices(train), val)
    group = "world" if accelerator.num_processes > 1 else None
    weighting = InfluenceWeighting(model, train, val, group=group)
    accelerator.register_for_checkpointing(weighting)  # save_state and load_state include the weights

    for epoch in range(epochs):
        weighting.start_epoch(epoch)
        for indices, (x, y) in train:
            with accelerator.accumulate(model):
                losses = F.cross_entropy(model(x), y, reduction="none")
                accelerator.backward((weighting(indices) * losses).mean())
                optimizer.step()
                optimizer.zero_grad()

    weights, flipped = weighting.weights.cpu(), digits.flipped
    test_x, test_y = digits.test_x.to(accelerator.device), digits.test_y.to(accelerator.device)
    accuracy = (model(test_x).argmax(1) == test_y).double().mean().item()
    accelerator.print(f"test accuracy: {accuracy:.1%}")
    right, wrong = weights[~flipped].mean(), weights[flipped].mean()
    accelerator.print(f"mean weight: {right:.2f} of right labels, {wrong:.2f} of wrong ones")
    return accuracy, weights, flipped


if __name__ == "__main__":
    main()
