"""Symmetric matrices with known eigenvalues, their right-hand sides, and what a solution must satisfy."""

import torch


def matrix_of(values, dtype=torch.float64):
    """A random symmetric matrix with these eigenvalues."""
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64)).Q
    return ((basis * values) @ basis.T).to(dtype)


def spectrum(P=40, condition=100.0, negative=0):
    values = torch.logspace(0, torch.tensor(condition).log10().item(), P, dtype=torch.float64)
    values[:negative] *= -1
    return values


def system(P=40, condition=100.0, negative=0):
    """A symmetric matrix with known eigenvalues, and a right-hand side."""
    return matrix_of(spectrum(P, condition, negative)), torch.randn(P, dtype=torch.float64)


def rows_of(C):
    """The product with C that solvers take."""
    return lambda V: V @ C


def residuals_of(C, x, b, damping=0.0):
    """Relative, of every row, in float64."""
    C, x, b = C.double(), x.double(), b.double()
    return (b - x @ C - damping * x).norm(dim=-1) / b.norm(dim=-1)


class Counting:
    """An operator that counts the vectors it has multiplied."""

    def __init__(self, C):
        self.C, self.products, self.vectors = C, 0, 0

    def matmat(self, V):
        self.products += 1
        self.vectors += len(V)
        return V @ self.C
