"""What the terms of embeddings do on a GPU, with CPU tensors: norms by pairs of positions; deterministic algorithms."""

import pytest
import torch

from kdaif_fast.per_sample.terms import embedding as module
from kdaif_fast.per_sample.terms.embedding import EmbeddingTerm

ROWS = 7


def term(N, T, dtype=torch.float64):
    torch.manual_seed(0)
    return EmbeddingTerm(torch.randint(ROWS, (N, T)), torch.randn(N, T, 5).to(dtype), torch.Size((ROWS, 5)))


@pytest.mark.parametrize(("N", "T"), [(0, 3), (3, 0), (1, 1), (4, 20)])
@pytest.mark.parametrize("most", [1 << 22, 1])  # samples together, and one by one
def test_norms_over_pairs_of_positions(N, T, most, monkeypatch):
    of = term(N, T)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", most)
    truth = of.grads().flatten(1).square().sum(1)
    torch.testing.assert_close(of._norms_by_pairs(), truth)
    torch.testing.assert_close(of.squared_norms(), truth)
    monkeypatch.setattr(EmbeddingTerm, "by_pairs", True)
    monkeypatch.setattr(EmbeddingTerm, "_rows", None)  # which waits
    torch.testing.assert_close(of.squared_norms(), truth)


def test_a_norm_is_never_negative():
    of = term(1, 2, torch.float32)
    of.indices.zero_()
    of.output_grads[0, 1] = -of.output_grads[0, 0] * (1 + 2**-23)
    assert float(of._norms_by_pairs()) >= 0
    of.output_grads[0, 1] = torch.nan
    assert of._norms_by_pairs().isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_under_deterministic_algorithms(dtype):
    """None of the operations is one that torch refuses then, and all are right."""
    of, weights = term(4, 20, dtype), torch.tensor([0.5, 0.0, 1.0, 2.0])
    G = term(4, 20, dtype).grads().float() if dtype == torch.float32 else term(4, 20).grads().float()
    V = torch.randn(2, ROWS, 5)
    torch.use_deterministic_algorithms(True)
    try:
        close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}
        torch.testing.assert_close(of.grads().float(), G, **close)
        torch.testing.assert_close(of.dots(V), torch.einsum("nrd,krd->nk", G, V), **close)
        torch.testing.assert_close(of.weighted(weights).float(), torch.einsum("n,nrd->rd", weights, G), **close)
        torch.testing.assert_close(
            of.squares(), G.square().sum(0), **close if dtype == torch.float32 else {"rtol": 0.1, "atol": 1}
        )
        for norms in (of.squared_norms(), of._norms_by_pairs()):
            torch.testing.assert_close(norms, G.square().sum((1, 2)), **close)
    finally:
        torch.use_deterministic_algorithms(False)
