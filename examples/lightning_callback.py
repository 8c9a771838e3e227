"""Lightning with weighted samples: a small network on digits, 30 % with wrong labels.

    python examples/lightning_callback.py

The callback measures; what changes in a module are the two lines with a comment, and with_indices around its loader.
"""

import lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kdaif_fast.demo.data import load_digits
from kdaif_fast.distill import with_indices
from kdaif_fast.integrations.lightning import InfluenceCallback


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x):
        return self.network(x)

    def training_step(self, indexed, batch_idx):
        _, (x, y) = indexed  # the indices of the samples are in it, too
        losses = F.cross_entropy(self(x), y, reduction="none")
        return (self.sample_weights * losses).mean()  # weights that the callback has put there

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_accuracy", (self(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


def main(epochs=15, **options):
    lightning.seed_everything(0)
    digits = load_digits(flip=0.3, seed=0)
    train = DataLoader(TensorDataset(digits.train_x, digits.train_y), batch_size=64, shuffle=True)
    val = DataLoader(TensorDataset(digits.val_x, digits.val_y), batch_size=200)  # labels that can be trusted
    model, influence = Classifier(), InfluenceCallback()
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=[influence], logger=False, accelerator="cpu", **options)
    trainer.fit(model, with_indices(train), val)

    weights, flipped = influence.weighting.weights, digits.flipped
    accuracy = (model(digits.test_x).argmax(1) == digits.test_y).double().mean().item()
    print(f"test accuracy: {accuracy:.1%}")
    print(f"mean weight: {weights[~flipped].mean():.2f} of right labels, {weights[flipped].mean():.2f} of wrong ones")
    return accuracy, weights, flipped


if __name__ == "__main__":
    main()
