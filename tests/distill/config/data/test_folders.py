"""torchvision's data sets, which are a protocol: a stand-in for the package has classes of the same form."""

import sys
import types

import pytest
import torch
from PIL import Image

from kdaif_fast._config import ConfigError

from .cases import all_of, loaded


class Pictures:
    """What all data sets of torchvision are like: item i is (picture of Pillow, label)."""

    def __init__(self, root, count, shift, transform=None):
        self.root, self.transform = root, transform
        self.targets = [i % 3 for i in range(count)]
        self.classes = ["a", "b", "c"]
        self._shift = shift

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        picture = Image.new("RGB", (5, 4), (index + self._shift, 0, 0))
        return (picture if self.transform is None else self.transform(picture)), self.targets[index]


class CIFAR10(Pictures):
    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        assert not download
        super().__init__(root, 12 if train else 6, 0 if train else 100, transform)


class SVHN(Pictures):
    def __init__(self, root, split="train", transform=None, target_transform=None, download=False):
        if split not in ("train", "test", "extra"):
            raise ValueError(f"unknown split {split}")
        super().__init__(root, 12 if split == "train" else 6, 0 if split == "train" else 100, transform)
        del self.classes


class ImageFolder(Pictures):
    def __init__(self, root, transform=None, target_transform=None, loader=None):
        super().__init__(root, 9, 0, transform)
        if "odd" in str(root):
            self.classes = ["a", "c"]


@pytest.fixture
def torchvision(monkeypatch):
    package, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    models = types.ModuleType("torchvision.models")
    package.datasets, package.models = datasets, models
    datasets.CIFAR10, datasets.SVHN, datasets.ImageFolder = CIFAR10, SVHN, ImageFolder
    for name, module in (("", package), (".datasets", datasets), (".models", models)):
        monkeypatch.setitem(sys.modules, f"torchvision{name}", module)
    return package


TABLE = 'kind = "torchvision"\nroot = "."\nbatch_size = 4\n'


def test_train_and_test(torchvision, tmp_path):
    data = loaded(tmp_path, TABLE + 'dataset = "CIFAR10"\nvalidation = 0.25\nflip = 0.5')
    assert [len(part.dataset) for part in (data.train, data.validation, data.test)] == [9, 3, 6]
    assert data.classes == 3
    assert data.facts.class_names == ["a", "b", "c"]
    for image, label in all_of(data.validation) + all_of(data.test):
        assert image.shape == (3, 4, 5)
        assert (round(float(image[0, 0, 0]) * 255) - (100 if image[0, 0, 0] > 0.3 else 0)) % 3 == label
    wrong = [round(float(image[0, 0, 0]) * 255) % 3 != label for image, label in all_of(data.train)]
    assert wrong == data.facts.flipped.tolist()
    assert sum(wrong) == round(0.5 * 9)
    first = round(float(data.train.dataset[0][0][0, 0, 0]) * 255)
    assert data.facts.describe(0).getpixel((0, 0))[0] == first


def test_splits_by_name(torchvision, tmp_path):
    data = loaded(tmp_path, TABLE + 'dataset = "SVHN"\nsplits = { test = "test" }\nvalidation = 2')
    assert [len(part.dataset) for part in (data.train, data.validation, data.test)] == [10, 2, 6]
    assert data.facts.class_names is None
    assert data.classes == 3  # by the labels
    assert loaded(tmp_path, TABLE + 'dataset = "SVHN"').test is None


def test_folders(torchvision, tmp_path):
    for name in ("train", "val", "more"):
        (tmp_path / name).mkdir()
    data = loaded(tmp_path, TABLE + 'dataset = "ImageFolder"\nsplits = { test = "more" }')
    assert [len(part.dataset) for part in (data.train, data.validation, data.test)] == [9, 9, 9]
    assert data.test.dataset.dataset.root == str(tmp_path / "more")


def test_arguments_transforms_and_classes_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Set:\n"
        "    def __init__(self, root, part):\n        self.part = part\n"
        "    def __len__(self):\n        return 8\n"
        "    def __getitem__(self, i):\n        return i, i % 2\n"
        "class AsTensor:\n"
        "    def __call__(self, i):\n        return torch.tensor([float(i)])\n"
        "def noisy(i):\n    return torch.tensor([float(i) + 100])\n"
    )
    splits = 'splits = { train = { part = 1 }, validation = { part = 2 } }\ntransform = "mine.py:AsTensor"'
    data = loaded(tmp_path, TABLE + f'dataset = "mine.py:Set"\n{splits}\ntrain_transform = "mine.py:noisy"')
    assert data.train.dataset.dataset.part == 1
    assert data.validation.dataset.dataset.part == 2
    assert [float(x) for x, _ in all_of(data.validation)] == list(range(8))
    assert min(float(x) for x, _ in all_of(data.train)) == 100
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the key 'data\.dataset' is missing"),
        ('dataset = "CIFAR11"', r"data\.dataset is 'CIFAR11', which torchvision\.datasets does not have; did you mean"),
        ('dataset = "SVHN"\nsplits = { test = "tset" }', r"data\.dataset is 'SVHN', which failed for test, as SVHN\("),
        ('dataset = "CIFAR10"\nsplits = { train = { trian = true } }', r"which failed for train, as .*trian=True"),
        ('dataset = "ImageFolder"\nsplits = { test = "none" }', r"data\.splits\.test is 'none', but there is no"),
        ('dataset = "ImageFolder"\nsplits = { test = "odd" }', r"data\.splits\.test has the classes \['a', 'c'\]"),
        ('dataset = "CIFAR10"\nsplits = { tests = "b" }', r"the key 'data\.splits\.tests' is unknown"),
        ('dataset = "CIFAR10"\nsplits = { test = 3 }', r"data\.splits\.test is 3, expected a part's name"),
    ],
)
def test_errors_name_the_key(torchvision, tmp_path, text, message):
    (tmp_path / "odd").mkdir()
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, TABLE + text)


def test_without_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ConfigError, match=r"data\.kind is 'torchvision': pip install torchvision"):
        loaded(tmp_path, TABLE + 'dataset = "CIFAR10"')


def test_a_batch(torchvision, tmp_path):
    images, labels = next(iter(loaded(tmp_path, TABLE + 'dataset = "CIFAR10"').train))
    assert images.shape == (4, 3, 4, 5)
    assert labels.dtype == torch.int64
