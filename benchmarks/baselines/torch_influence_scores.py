"""Influence by torch-influence (0.1): CGInfluenceModule on the Gauss-Newton matrix, SciPy's CG, a loop over samples."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def torch_influence_scores(
    model: nn.Module, batch, val, damping: float, tol: float, max_iter: int = 2000, gauss_newton: bool = True
) -> Tensor:
    """phi [N], positive = harmful: -n times the change of the validation loss when the sample is left out."""
    from torch_influence import BaseObjective, CGInfluenceModule

    class Objective(BaseObjective):
        def train_outputs(self, model, batch):
            return model(batch[0])

        def train_loss_on_outputs(self, outputs, batch):
            return F.cross_entropy(outputs, batch[1])

        def train_regularization(self, params):
            return 0.0 * params.sum()  # differentiated twice, so not a number

        def test_loss(self, model, params, batch):
            return F.cross_entropy(model(batch[0]), batch[1])

    module = CGInfluenceModule(
        copy.deepcopy(model),  # it replaces the parameters
        Objective(),
        DataLoader(TensorDataset(*batch), batch_size=len(batch[0])),
        DataLoader(TensorDataset(*val), batch_size=len(val[0])),
        torch.device("cpu"),
        damping,
        gnh=gauss_newton,
        rtol=tol,
        maxiter=max_iter,
    )
    left_out = module.influences(list(range(len(batch[0]))), list(range(len(val[0]))))
    return -len(batch[0]) * left_out
