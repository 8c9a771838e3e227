"""Influence by dattri (0.3): IFAttributorCG, conjugate gradients on the Hessian by double backward under torch.func.

Its public `attribute` solves for every validation sample; the mean gradient goes through the same steps here by itself.
"""

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def dattri_influence_scores(model: nn.Module, batch, val, damping: float, tol: float, max_iter: int = 2000) -> Tensor:
    """phi [N], positive = harmful. tol is relative; dattri's own is absolute."""
    from dattri.algorithm.influence_function import IFAttributorCG
    from dattri.task import AttributionTask
    from torch.func import functional_call

    def loss(parameters, data):
        inputs, labels = data
        return F.cross_entropy(functional_call(model, parameters, (inputs,)), labels)

    def sample_loss(parameters, data):
        inputs, label = data
        return F.cross_entropy(functional_call(model, parameters, (inputs,)), label)

    task = AttributionTask(loss, model, checkpoints=dict(model.state_dict()), target_func=sample_loss)
    attributor = IFAttributorCG(task, max_iter=max_iter, tol=tol, regularization=damping)
    validation = attributor.generate_test_rep(0, tuple(part.unsqueeze(0) for part in val)).mean(0, keepdim=True)
    attributor.transformation_kwargs["tol"] = tol * float(validation.norm())
    attributor.cache(DataLoader(TensorDataset(*batch), batch_size=len(batch[0])))
    s = attributor.transform_test_rep(0, validation)
    train = attributor.generate_train_rep(0, tuple(part.unsqueeze(0) for part in batch))
    return -(train @ s.T)[:, 0].detach()
