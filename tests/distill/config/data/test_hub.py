"""Data sets of Hugging Face `datasets`, from files that the tests write; the network is never asked."""

import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from kdaif_fast._config import ConfigError

from .cases import all_of, loaded

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of packages that it imports
    import datasets

TEXTS = [f"a {'good' if i % 2 else 'bad'} film number {i} {'indeed ' * (i % 4)}" for i in range(20)]
LABELS = [i % 2 for i in range(20)]


def rows(n=20, **columns):
    given = {"sentence": TEXTS[:n], "label": LABELS[:n]}
    return datasets.Dataset.from_dict({**given, **columns})


def save(folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")


@pytest.fixture
def table(tmp_path):
    """The start of [data], with a cache of the test's own."""
    return f'kind = "datasets"\ncache = "{tmp_path / "cache"}"\nbatch_size = 4\n'


def test_texts_of_parquet_files(tmp_path, table):
    (tmp_path / "glue").mkdir()
    rows().to_parquet(tmp_path / "glue" / "train-00000-of-00001.parquet")
    rows(6).to_parquet(tmp_path / "glue" / "validation-00000-of-00001.parquet")
    rows(5, label=[-1] * 5).to_parquet(tmp_path / "glue" / "test-00000-of-00001.parquet")
    data = loaded(tmp_path, table + 'path = "glue"\nflip = 0.25')
    assert len(data.train.dataset) == 20
    assert len(data.validation.dataset) == 6
    assert data.test is None  # its labels are kept secret
    assert data.classes == 2
    inputs, labels = next(iter(data.validation))
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert inputs["attention_mask"].sum(1).tolist() == [len(text.split()) for text in TEXTS[:4]]
    assert labels.tolist() == LABELS[:4]
    assert data.vocabulary > int(inputs["input_ids"].max())
    assert int(data.facts.flipped.sum()) == 5
    given = [label for _, label in all_of(data.train)]
    assert [a != b for a, b in zip(given, LABELS, strict=True)] == data.facts.flipped.tolist()
    assert data.facts.describe(3) == TEXTS[3]


def test_secret_labels_that_are_asked_for(tmp_path, table):
    save(tmp_path, train=rows(), test=rows(5, label=[-1] * 5))
    with pytest.raises(ConfigError, match=r"data\.splits\.test has labels below 0"):
        loaded(tmp_path, table + 'path = "saved"\nsplits = { test = "test" }')


def test_save_to_disk_splits_and_holding_out(tmp_path, table):
    save(tmp_path, train=rows(), validation=rows(6))
    data = loaded(tmp_path, table + 'path = "saved"\nvalidation = 0.2\nsplits = { test = "validation" }')
    assert [len(part.dataset) for part in (data.train, data.validation, data.test)] == [16, 4, 6]
    default = loaded(tmp_path, table + 'path = "saved"\nsplits = { test = "validation" }')
    assert len(default.validation.dataset) == 2  # not what is tested on
    rows().save_to_disk(tmp_path / "one")
    assert len(loaded(tmp_path, table + 'path = "one"\nvalidation = 5').train.dataset) == 15


def test_names_of_classes_groups_and_pairs(tmp_path, table):
    kinds = ["yes" if label else "no" for label in LABELS]
    save(tmp_path, train=rows(label=kinds, other=TEXTS[::-1], source=["a", "b"] * 10))
    columns = 'columns = { text = ["sentence", "other"], label = "label", group = "source" }'
    data = loaded(tmp_path, table + f'path = "saved"\nvalidation = 4\n{columns}')
    assert data.facts.class_names == ["no", "yes"]
    assert data.facts.describe(0).count("\n") == 1
    shown = [data.facts.describe(index).split("\n")[0] for index in range(16)]
    assert data.facts.groups == ["ab"[TEXTS.index(text) % 2] for text in shown]
    assert [label for _, label in all_of(data.train)] == [LABELS[TEXTS.index(text)] for text in shown]


def test_csv_and_numbers(tmp_path, table):
    lines = ["a,b,label"] + [f"{i},{i / 2},{i % 3}" for i in range(12)]
    (tmp_path / "numbers.csv").write_text("\n".join(lines))
    columns = 'columns = { features = ["a", "b"] }'
    data = loaded(tmp_path, table + f'path = "numbers.csv"\nvalidation = 3\n{columns}')
    x, y = next(iter(data.validation))
    assert x.dtype == torch.float32
    assert torch.equal(x[:, 0] / 2, x[:, 1])
    assert torch.equal(x[:, 0].long() % 3, y)
    assert data.classes == 3


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures, with each class's brightness."""
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for at in range(count):
                pixels = np.full((6, 8, 3), 100 * label + at, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{at}.png")
    return tmp_path


def test_folders_of_pictures(pictures, table):
    data = loaded(pictures, table + 'path = "pets"\nvalidation = 2\nsize = [4, 3]')
    assert [len(part.dataset) for part in (data.train, data.validation, data.test)] == [6, 2, 4]
    assert data.facts.class_names == ["cat", "dog"]
    for image, label in all_of(data.train) + all_of(data.test):
        assert image.shape == (3, 4, 3)
        assert (float(image.mean()) * 255 > 50) == bool(label)
    assert data.facts.describe(0).size == (8, 6)
    plain = all_of(loaded(pictures, table + 'path = "pets"\nchannels = 1').test)
    other = all_of(loaded(pictures, table + 'path = "pets"\nchannels = 1\nmean = [0.5]\nstd = [0.25]').test)
    assert plain[0][0].shape == (1, 6, 8)
    torch.testing.assert_close((plain[0][0] - 0.5) / 0.25, other[0][0])


def test_augmentation_is_for_training_only(pictures, table):
    (pictures / "augment.py").write_text("def double(picture):\n    return picture.resize((16, 12))\n")
    text = 'path = "pets"\nvalidation = 2\ntrain_transform = "augment.py:double"'
    data = loaded(pictures, table + text)
    assert all_of(data.train)[0][0].shape == (3, 12, 16)
    assert all_of(data.validation)[0][0].shape == all_of(data.test)[0][0].shape == (3, 6, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the key 'data\.path' is missing"),
        ('path = "none"', r"data\.path is 'none', but there is no"),
        ('path = "saved"\nformat = "xml"', r"data\.format is 'xml', expected one of parquet, csv"),
        ('path = "saved"\nformat = "parquet"', r"data\.path is .*saved', which cannot be read: "),
        (
            'path = "saved"\nsplits = { train = "trian" }',
            r"data\.splits\.train is 'trian', expected one of train, more",
        ),
        ('path = "saved"\nsplits = { trian = "train" }', r"the key 'data\.splits\.trian' is unknown"),
        ('path = "saved"\nsplits = { train = 1 }', r"data\.splits\.train is 1, expected a split's name"),
        ('path = "saved"\ncolumns = { text = "sentense" }', r"data\.columns\.text is 'sentense', expected one of sent"),
        ('path = "saved"\ncolumns = { texts = "sentence" }', r"the key 'data\.columns\.texts' is unknown"),
        (
            'path = "saved"\ncolumns = { text = "sentence", label = "half" }',
            r"data\.columns\.label is 'half', a column of float",
        ),
        ('path = "saved"\ncolumns = { text = "some" }', r"data\.columns\.text is 'some', but row 1 has None there"),
        ('path = "saved"\ncolumns = { text = "a", image = "b" }', r"data\.columns has text and image, expected one"),
        (
            'path = "saved"\ncolumns = { features = "sentence" }',
            r"data\.columns\.features is \('sentence',\), expected",
        ),
        ('path = "saved"', r"the key 'data\.columns' is missing: expected text, image or features"),
        ('path = "bare"', r"the key 'data\.columns\.label' is missing: expected one of the columns sentence"),
        ('path = "saved"\ntokenizer = "saved"\ncolumns = { text = "sentence" }', r"data\.tokenizer is 'saved', which"),
        ('path = "saved"\nsize = [3]', r"data\.size is \[3\], expected \[height, width\]"),
        ('path = "saved"\nmean = [0.1, 0.2]', r"data\.mean is \[0\.1, 0\.2\], expected a number for each channel"),
        ('path = "saved"\nstd = [0.0]', r"data\.std is \[0\.0\], expected numbers > 0"),
        ('path = "saved"\ntransform = "f"', r"data\.transform is 'f', expected 'module:function'"),
        ('path = "notes.txt"', r"data\.path is 'notes\.txt', expected a folder, or a file that ends in \.parquet"),
    ],
)
def test_errors_name_the_key(tmp_path, table, text, message):
    save(tmp_path, train=rows(half=[0.5] * 20, some=["a", None] * 10), more=rows())
    rows().remove_columns("label").save_to_disk(tmp_path / "bare")
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, table + text)


def test_pictures_of_different_sizes(pictures, table):
    Image.new("RGB", (3, 3)).save(pictures / "pets" / "train" / "cat" / "small.png")
    with pytest.raises(ConfigError, match=r"different sizes need data\.size"):
        loaded(pictures, table.replace("4", "64") + 'path = "pets"\nvalidation = 1')


def test_a_tokenizer_of_transformers(tmp_path, table):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of packages that it imports
        from transformers import BertTokenizer
    words = sorted({word for text in TEXTS for word in text.split()})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "tokenizer")
    save(tmp_path, train=rows())
    data = loaded(tmp_path, table + 'path = "saved"\ntokenizer = "tokenizer"\nvalidation = 4\nlongest = 6')
    inputs, _ = next(iter(data.validation))
    assert set(inputs) == {"input_ids", "token_type_ids", "attention_mask"}
    assert inputs["input_ids"].shape[1] == 6
    assert (inputs["input_ids"][:, 0] == 2).all()
    assert data.vocabulary == 5 + len(words)
