"""What an iteration of conjugate gradients does to its vectors, as one writes it in PyTorch."""

import torch


def eager_cg_update(x, r, p, Ap, steps, damping):
    Ap = Ap.add(p, alpha=damping)
    x.addcmul_(p, steps[:, None])
    r.addcmul_(Ap, steps[:, None], value=-1)
    return torch.linalg.vecdot(r, r)


def eager_cg_dots(p, q):
    return torch.stack([torch.linalg.vecdot(p, q), torch.linalg.vecdot(p, p)])
