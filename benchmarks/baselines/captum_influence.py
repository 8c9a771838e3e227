"""Influence by captum (0.9): TracInCPFast (last layer's gradient dots) and ArnoldiInfluenceFunction (low rank).

Both return <., .> for every pair, with mean or summed losses; positive = helpful, so the sign is turned.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def tracin_scores(model: nn.Sequential, batch, val) -> Tensor:
    """phi [N] of the model as its only checkpoint, with learning rate 1: no curvature, last layer only."""
    from captum.influence import TracInCPFast

    loss = nn.CrossEntropyLoss(reduction="sum")
    with tempfile.TemporaryDirectory() as folder:
        influence = TracInCPFast(
            *(model, list(model)[-1], TensorDataset(*batch), [_save(model, folder)]),
            **{"checkpoints_load_func": _load, "loss_fn": loss, "batch_size": len(batch[0])},
        )
        return -influence.influence(val, show_progress=False).mean(0)


def arnoldi_scores(model: nn.Sequential, batch, val, damping: float, rank: int = 50) -> Tensor:
    """phi [N] from captum's low-rank inverse of the Hessian, with its default Arnoldi dimension of 200."""
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

    with tempfile.TemporaryDirectory() as folder:
        influence = ArnoldiInfluenceFunction(
            *(model, TensorDataset(*batch), _save(model, folder)),
            checkpoints_load_func=_load,
            loss_fn=nn.CrossEntropyLoss(reduction="sum"),
            sample_wise_grads_per_batch=True,
            batch_size=len(batch[0]),
            projection_dim=rank,
            hessian_reg=damping,
        )
        scores = influence.influence(val)
    # Its Hessian is that of the summed loss.
    return -scores.mean(0).detach() * len(batch[0])


def _save(model: nn.Module, folder: str) -> str:
    path = str(Path(folder) / "checkpoint.pt")
    torch.save(model.state_dict(), path)
    return path


def _load(model: nn.Module, path: str) -> float:
    model.load_state_dict(torch.load(path))
    return 1.0
