"""Models after fully_shard (FSDP2): gathered, then used like any other."""

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

from kdaif_fast import gathered, influence_scores
from kdaif_fast.curvature import GaussNewton, Hessian
from kdaif_fast.per_sample import per_sample_grad_dots
from tests.cases import make
from tests.curvature.test_dense_truth import error
from tests.distributed.processes import start
from tests.distributed.test_curvature import share

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")


def sharded(name, together):
    """The model, whole and as fully_shard leaves it; `together`: one call for several layers."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    plain, batch, val = make(name)
    torch.manual_seed(0)
    model = make(name)[0]
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    # A tied embedding is used outside of its own layer: it belongs to the whole model.
    layers = [x for x in model.children() if list(x.parameters()) and not isinstance(x, nn.Embedding)]
    for layer in [layers] if together else layers[:-1]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return plain, model, batch, val


def check(rank, world):
    for name, together in (("mlp", False), ("mlp", True), ("attention", False), ("batch norm", False)):
        plain, model, batch, val = sharded(name, together)
        with pytest.raises(TypeError, match=r"fully_shard .* kdaif_fast.gathered\(model\)"):
            GaussNewton(model, batch)
        model(batch[0])  # leaves some of the parameters gathered
        whole = gathered(model)
        assert [n for n, _ in whole.named_parameters()] == [n for n, _ in plain.named_parameters()]
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), plain.parameters(), strict=True))
        assert all(type(p) is nn.Parameter and p.requires_grad for p in whole.parameters())
        assert [type(m) for m in whole.modules()] == [type(m) for m in plain.modules()]
        mine = share(batch, (5, 7), rank)
        V = torch.randn(2, sum(p.numel() for p in plain.parameters()), dtype=torch.float64)
        distributed.broadcast(V, 0)
        for operator in (GaussNewton, Hessian):
            expected, made = operator(plain, batch), operator(whole, mine, group="world")
            assert error(made.matmat(V), expected.matmat(V)) < 1e-10
            assert error(made.matvec(V[1]), expected.matvec(V[1])) < 1e-10
        options = {"damping": 0.1, "tol": 1e-8}
        assert (
            error(influence_scores(whole, batch, val, **options), influence_scores(plain, batch, val, **options)) < 1e-6
        )
        dots = per_sample_grad_dots(whole, mine, V[0])
        assert error(dots, per_sample_grad_dots(plain, mine, V[0])) < 1e-10
        check_training_goes_on(model, plain, whole, batch)


def check_training_goes_on(model, plain, whole, batch):
    """The sharded model trains on as if it had not been gathered, and the copy stays as it was."""
    before = [p.clone() for p in whole.parameters()]
    for m in (model, plain):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        F.cross_entropy(m(batch[0]), batch[1]).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach())
        assert p.grad is not None
    assert all(torch.equal(p, q) for p, q in zip(before, whole.parameters(), strict=True))
    assert all(p.grad is None for p in whole.parameters())


def test_fully_sharded_models():
    start(check, 2)


def test_a_model_that_is_not_sharded():
    """It is copied, with its tied parameters and everything that it holds; parameters are shared."""
    model, batch, _ = make("attention")
    model.again = [model.twice]  # held a second time, outside of what modules know
    whole = gathered(model)
    assert whole is not model
    assert whole.again[0] is whole.twice
    assert whole.embedding.weight is model.embedding.weight
    assert torch.equal(whole(batch[0]), model(batch[0]))
    with pytest.raises(TypeError, match="model is a int, expected"):
        gathered(3)
