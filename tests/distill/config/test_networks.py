"""Networks that a config names: of functions, torchvision, and transformers, from folders that the tests write."""

import os
import sys
import types
import warnings

import pytest
import torch

from kdaif_fast._config import ConfigError, Importer
from kdaif_fast.distill.config.data import Loaded
from kdaif_fast.distill.config.networks import build_model
from kdaif_fast.distill.config.reading import ModelOptions, Named
from kdaif_fast.distill.runs.samples_file import SampleFacts

os.environ.update(HF_HUB_OFFLINE="1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of packages that it imports
    import transformers

TINY = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "max_position_embeddings": 32,
}
TEXT = {"input_ids": torch.randint(0, 30, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}


def build(folder, model, inputs=TEXT, checkpoint=None, auto=None, classes=3, **arguments):
    optimizer = Named("student.optimizer", "Adam", {})
    options = ModelOptions("student", model, arguments, auto, checkpoint, optimizer, None)
    data = Loaded([], [], None, SampleFacts(), classes, 30, inputs)
    return build_model(options, Importer(folder / "run.toml"), data)


@pytest.fixture
def bert(tmp_path):
    """A folder with a tiny BERT."""
    torch.manual_seed(1)
    config = transformers.BertConfig(vocab_size=30, num_labels=3, **TINY)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "bert")
    return model


def test_a_folder_with_weights(bert, tmp_path):
    model = build(tmp_path, "transformers:bert").eval()
    assert type(model) is transformers.BertForSequenceClassification
    assert torch.equal(model(**TEXT).logits, bert(**TEXT).logits)
    assert build(tmp_path, "transformers:bert", hidden_dropout_prob=0.3).config.hidden_dropout_prob == 0.3


def test_a_folder_with_a_config_only(bert, tmp_path):
    bert.config.save_pretrained(tmp_path / "config")
    model = build(tmp_path, "transformers:config", classes=4)
    assert model(**TEXT).logits.shape == (2, 4)


def test_a_type_of_model(tmp_path):
    model = build(tmp_path, "transformers:bert", **TINY)
    assert model.config.vocab_size == 30
    assert model(**TEXT).logits.shape == (2, 3)
    other = build(tmp_path, "transformers:bert", auto="AutoModelForTokenClassification", **TINY)
    assert other(**TEXT).logits.shape == (2, 5, 3)


def test_pictures(tmp_path):
    sizes = {key: TINY[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    images = torch.rand(2, 3, 8, 8)
    model = build(tmp_path, "transformers:vit", images, image_size=8, patch_size=4, **sizes)
    assert model(images).logits.shape == (2, 3)


def test_torchvision(tmp_path, monkeypatch):
    package, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    package.models = models
    models.resnet18 = lambda num_classes=1000, width=2: torch.nn.Linear(width, num_classes)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    model = build(tmp_path, "torchvision:resnet18", width=4)
    assert (model.in_features, model.out_features) == (4, 3)
    with pytest.raises(ConfigError, match=r"student\.model is 'torchvision:resnet19', but .* did you mean 'resnet18'"):
        build(tmp_path, "torchvision:resnet19")
    with pytest.raises(ConfigError, match=r"student\.model is 'torchvision:resnet18', which failed: TypeError"):
        build(tmp_path, "torchvision:resnet18", depth=4)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ConfigError, match="pip install torchvision"):
        build(tmp_path, "torchvision:resnet18")


def test_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "project", raising=False)
    weights = torch.nn.Linear(2, 3).state_dict()
    torch.save(weights, tmp_path / "model.pt")
    (tmp_path / "project.py").write_text("import torch\ndef linear(classes):\n    return torch.nn.Linear(2, classes)\n")
    model = build(tmp_path, "project.py:linear", checkpoint=tmp_path / "model.pt")
    assert torch.equal(model.weight, weights["weight"])
    with pytest.raises(
        ConfigError, match=r"(?s)student\.checkpoint is .*model\.pt', which cannot be loaded: .*size mismatch"
    ):
        build(tmp_path, "project.py:linear", checkpoint=tmp_path / "model.pt", classes=4)
    sys.modules.pop("project", None)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (
            "transformers:brt",
            {},
            r"student\.model is 'transformers:brt', but there is no folder .* did you mean 'bert'",
        ),
        ("transformers:bert", {"hiden_size": 3}, r"the key 'student\.arguments\.hiden_size' is unknown.*'hidden_size'"),
        ("transformers:bert", {"auto": "Trainer"}, r"student\.auto is 'Trainer', expected a class AutoModelFor"),
        (
            "transformers:bert",
            {"hidden_size": 15, "num_attention_heads": 2},
            r"'transformers:bert', which cannot be built",
        ),
    ],
)
def test_errors_name_the_key(tmp_path, model, more, message):
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, model, **more)
