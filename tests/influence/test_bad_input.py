"""What influence_scores refuses, with what message; and what it must not refuse."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kdaif_fast
from kdaif_fast import influence_scores
from tests.cases import CLASSES, M, make


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"curvature": "fisher"}, ValueError, "curvature is 'fisher', expected one of 'ggn'"),
            ({"solver": "magic"}, ValueError, "solver is 'magic', expected one of 'cg'"),
            ({"damping": -1}, ValueError, "damping is -1"),
            ({"damping": "much"}, TypeError, "damping is 'much'"),
            ({"damping": True}, TypeError, "damping is True"),
            ({"tol": 7.0}, ValueError, "tol is 7.0"),
            ({"tol": "low"}, TypeError, "tol is 'low'"),
            ({"tol": 7.0, "curvature": "identity"}, ValueError, "tol is 7.0"),
            ({"max_iter": 2.5}, TypeError, "max_iter is 2.5"),
            ({"max_iter": 0}, ValueError, "max_iter is 0"),
            ({"memory": "2GB"}, ValueError, "memory is '2GB', expected a positive number of bytes"),
            ({"memory": 0}, ValueError, "memory is 0"),
            ({"batch": torch.ones(3)}, TypeError, "batch is a Tensor"),
            ({"batch": (torch.ones(3),)}, ValueError, "batch has 1 parts"),
            ({"batch": [1, 2, 3, 4]}, ValueError, "batch has 4 parts"),
            ({"batch": iter([])}, TypeError, "a list_iterator, which can be gone through only once"),
            (
                {"val": (torch.ones(M, 4).numpy(), torch.ones(M).long())},
                TypeError,
                "val: inputs has a ndarray of NumPy",
            ),
            ({"val": (torch.ones(M, 9).double(), torch.ones(M).long())}, RuntimeError, "failed on the inputs of val"),
            ({"val": (torch.ones(M, 4).double(), torch.ones(3).long())}, ValueError, "val: 3 targets for 7 samples"),
            ({"val": (torch.ones(M, 4).double(), torch.ones(M).int())}, ValueError, r"val: .*targets\.long\(\)"),
            ({"loss": "ce"}, TypeError, "loss is a str"),
            ({"loss": lambda z, y: z.detach().sum(1)}, ValueError, "batch|val.* do not depend on the outputs"),
            ({"val": {"x": 1, "targets": 2}}, ValueError, r"val has the keys \['targets', 'x'\]"),
            ({"params": []}, ValueError, "params is empty"),
            ({"params": ["3.weight"]}, ValueError, "params contains '3.weight'"),
            ({"params": [3]}, TypeError, "params contains a int"),
            ({"params": nn.Linear(1, 1)}, ValueError, "params contains a module Linear"),
            ({"params": [torch.ones(2)]}, ValueError, r"params contains a tensor of shape \(2,\)"),
            (
                {"loss": lambda z, y: F.cross_entropy(z, y)},
                ValueError,
                r"loss returned \(\) for batch, expected \(12,\)",
            ),
            ({"loss": lambda z, y: 3.0}, ValueError, "loss returned float for batch"),
            (
                {"val": (torch.ones(M, 4, dtype=torch.float64), torch.ones(M))},
                ValueError,
                r"val: the default loss needs .* the targets torch.float32 \(7,\)",
            ),
            ({"batch": (torch.ones(0, 4).double(), torch.ones(0).long())}, ValueError, "batch has no samples"),
        ],
    )
    def test_message(self, change, error, message):
        model, batch, val = make("mlp")
        arguments = {"batch": batch, "val": val, **change}
        with pytest.raises(error, match=message):
            influence_scores(model, **arguments)

    def test_label_out_of_range(self):
        model, batch, val = make("mlp")
        batch[1][3] = CLASSES
        with pytest.raises(ValueError, match=rf"the loss failed on batch: .*labels\[3\] is {CLASSES}"):
            influence_scores(model, batch, val)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["batch", "val"])
    def test_a_sample_that_is_not_finite(self, name, value):
        model, batch, val = make("mlp")
        {"batch": batch, "val": val}[name][0][2, 1] = value
        model[0].weight.data[:, 1] = 0.5
        if value == float("inf"):
            model[1] = nn.ReLU()  # tanh would make it finite
        with pytest.raises(ValueError, match=f"{name}: sample 2 has the loss"):
            kdaif_fast.influence_weights(model, batch, val, tol=None)

    def test_model_that_is_no_module(self):
        _, batch, val = make("mlp")
        with pytest.raises(TypeError, match="model is a function"):
            influence_scores(lambda x: x, batch, val)

    def test_batch_norm_without_statistics(self):
        _, batch, val = make("mlp")
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double().eval()
        with pytest.raises(ValueError, match="no running statistics"):
            influence_scores(model, batch, val)

    def test_functional_dropout(self):
        _, batch, val = make("mlp")

        class Dropping(nn.Linear):
            def forward(self, x):
                return F.dropout(super().forward(x), 0.5, self.training)

        model = Dropping(4, 3).double()
        with pytest.raises(ValueError, match="outputs on batch are random"):
            influence_scores(model, batch, val)
        influence_scores(model.eval(), batch, val, damping=0.1)

    def test_drawing_without_using_is_allowed(self):
        _, batch, val = make("mlp")

        class LayerDrop(nn.Linear):
            def forward(self, x):
                skip = torch.rand([]) < 0.5 and self.training
                return x[:, :3] if skip else super().forward(x)

        influence_scores(LayerDrop(4, 3).double().eval(), batch, val, damping=0.1)

    def test_loss_without_second_derivatives(self):
        """Fused losses that store their gradient in the forward pass: no curvature, silently."""

        class Fused(torch.autograd.Function):
            @staticmethod
            def forward(ctx, z, y):
                ctx.save_for_backward(z.softmax(1) - F.one_hot(y, CLASSES))
                return F.cross_entropy(z, y, reduction="none")

            @staticmethod
            def backward(ctx, grad):
                return grad[:, None] * ctx.saved_tensors[0], None

        model, batch, val = make("mlp")
        with pytest.raises(RuntimeError, match="gradient that is not differentiable itself"):
            influence_scores(model, batch, val, loss=Fused.apply, damping=0.1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_no_false_alarm_of_the_derivative_check(self, dtype):
        large = nn.Linear(64, 10).to(dtype)
        batch = (torch.randn(1000, 64) + 3).to(dtype), torch.randint(10, (1000,))
        influence_scores(large, batch, batch, curvature="identity")
        # The key's bias in attention has no effect, but for rounding.
        attention = nn.MultiheadAttention(8, 2, batch_first=True).to(dtype).eval()

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention, self.key_bias = attention, nn.Parameter(torch.zeros(8, dtype=dtype))

            def forward(self, x):
                return self.attention(x, x + self.key_bias - self.key_bias.detach() * 0, x)[0].mean(1)

        x = torch.randn(20, 5, 8).to(dtype), torch.randint(8, (20,))
        influence_scores(Model(), x, x, curvature="identity", params=["key_bias"])

    def test_layer_without_second_derivatives(self):
        """Its part of the products would be missing, silently."""

        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx, grad):
                with torch.no_grad():
                    return 2 * ctx.saved_tensors[0] * grad

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

            def forward(self, x):
                return self.second(Square.apply(self.first(x)))

        _, batch, val = make("mlp")
        with pytest.raises(RuntimeError, match=r"custom autograd\.Functions"):
            influence_scores(Model().double(), batch, val, damping=0.1)

    def test_arguments_of_the_wrong_kind(self):
        model, batch, val = make("mlp")
        with pytest.raises(ValueError, match=r"curvature is \['ggn'\]"):
            influence_scores(model, batch, val, curvature=["ggn"])
        with pytest.raises(TypeError, match="params is a int"):
            influence_scores(model, batch, val, params=5)

    def test_parameters_that_are_not_used(self):
        model, batch, val = make("mlp")
        model.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
        with pytest.raises(ValueError, match="do not depend on the chosen parameters"):
            influence_scores(model, batch, val, params=["idle"])

    @pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.Dropout(0.1)])
    def test_layers_that_mix_samples_or_draw(self, layer):
        model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3)).double()
        _, batch, val = make("mlp")
        with pytest.raises(ValueError, match=r"module '1' .*model\.eval\(\)"):
            influence_scores(model, batch, val)
        if not isinstance(layer, nn.SyncBatchNorm):  # which runs on GPUs only
            influence_scores(model.eval(), batch, val, damping=0.1)

    def test_frozen_model(self):
        model, batch, val = make("mlp")
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="no parameter that requires grad"):
            influence_scores(model, batch, val)
