"""Influence by pyDVL (0.10): CgInfluence, on the Hessian.

Its scores are <(C + damping I)^-1 grad l_val, grad l_i> for every pair; the mean over validation samples is taken by
linearity, from the factor of the mean gradient, since 200 solves would not be the same problem.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def pydvl_influence_scores(model: nn.Module, batch, val, damping: float, tol: float, max_iter: int = 2000) -> Tensor:
    """phi [N], positive = harmful."""
    from pydvl.influence.torch import CgInfluence

    influence = CgInfluence(
        model,
        F.cross_entropy,
        regularization=damping,
        rtol=tol,
        atol=0.0,
        maxiter=max_iter,
        warn_on_max_iteration=False,
    )
    influence = influence.fit(DataLoader(TensorDataset(*batch), batch_size=len(batch[0])))
    # The gradient of the mean loss is that of one "sample" which is the whole validation set: factors of all samples
    # would be one solve each.
    loss = F.cross_entropy(model(val[0]), val[1])
    b = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    (operator,) = (block.op for block in influence.block_mapper.composable_block_dict.values())
    s = operator.apply(b[None]).detach()
    return -influence.influences_from_factors(s, *batch)[0].detach()
