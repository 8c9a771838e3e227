"""Kronecker-factored curvature with eigenvalues of its own."""

from __future__ import annotations

from .kfac import KFAC


class EKFAC(KFAC):
    """K-FAC's eigenvectors, with the eigenvalues that are best for them: E[(Q_B^T G_i Q_A)^2], element by element.

    G_i is sample i's gradient in a layer, Q_A and Q_B the eigenvectors of the factors. No diagonal in that basis is
    nearer to the layer's block in the Frobenius norm; in particular its trace is exact, where K-FAC's is one of a
    product of means. What is left out is what lies off the diagonal, and everything between layers.

    So it is no near substitute for the damped matrix itself where influence is concerned. On digits with damping 0.1
    times the mean eigenvalue (benchmarks/kfac_quality.py) its scores have Spearman 0.51 with the exact ones on a
    three-layer perceptron and 0.39 on a small convolutional network; without the blocks between layers but exact
    otherwise it would be 0.85 and 0.80, so most is lost within layers. `fisher` hardly matters, and more damping helps:
    0.83 and 0.69 at 100 times as much. As a preconditioner it saves conjugate gradients a third to six sevenths of the
    products to a residual of 0.1, at 0.01 up to two thirds on the perceptron with little damping but nothing with more
    or on the convolutional network, and to 1e-4 it takes more of them.

    Args, raises: those of `KFAC`. The second pass over the data takes the same draws as the first.

    Memory: as KFAC; the layers' inputs and output gradients of a batch up to `memory` bytes, and 4 MB blocks of rotated
        gradients (one sample's, where that is more).

    Source: George et al. 2018 (arXiv 1806.03884), equation 11; for influence: Grosse et al. 2023 (arXiv 2308.03296).

    Example:
        >>> import torch, kdaif_fast
        >>> model = torch.nn.Linear(2, 3)
        >>> batch = torch.randn(50, 2), torch.randint(0, 3, (50,))
        >>> exact = EKFAC(model, batch, fisher="empirical")
        >>> mean_square = sum(p.square().sum() for p in kdaif_fast.per_sample_grads(model, batch).values()) / (50 * 9)
        >>> abs(exact.mean_eigenvalue() - float(mean_square)) < 1e-6
        True
    """

    _corrects = True
