import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from kdaif_fast.distill.runs.sample_contents import LONGEST, WIDEST, Content, describe_samples
from tests.properties import given, st, st_numpy


def shown(*samples, image_shape=None):
    return list(describe_samples(range(len(samples)), samples.__getitem__, image_shape).values())


def pixels(content):
    assert content.text is None
    assert content.note is None
    image = Image.open(io.BytesIO(base64.b64decode(content.image)))
    assert image.format == "PNG"
    assert image.size == (content.width, content.height)
    return np.asarray(image)


GREY = np.arange(0, 60, 10, dtype=np.uint8).reshape(2, 3)
COLOURED = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (torch.from_numpy(GREY), GREY),
        (torch.from_numpy(GREY)[None], GREY),
        (GREY[..., None], GREY),
        (COLOURED, COLOURED),
        (torch.from_numpy(COLOURED).permute(2, 0, 1), COLOURED),
        (Image.fromarray(GREY), GREY),
        (Image.fromarray(COLOURED), COLOURED),
        ((torch.from_numpy(GREY), 3), GREY),
        ([GREY, 1], GREY),
        ({"image": Image.fromarray(COLOURED), "label": 1}, COLOURED),
        ({"pixel_values": torch.from_numpy(GREY), "text": "not this"}, GREY),
        ({"x": torch.from_numpy(GREY)}, GREY),
        (torch.from_numpy(GREY > 25), np.where(GREY > 25, 255, 0)),
    ],
)
def test_pictures(sample, expected):
    (content,) = shown(sample)
    assert np.array_equal(pixels(content), expected)


def test_other_modes_of_pillow():
    for mode in ("P", "1", "LA", "CMYK", "I"):
        (content,) = shown(Image.fromarray(GREY).convert(mode))
        assert pixels(content).shape[:2] == GREY.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_pixels_of_any_range_share_one_scale(dtype):
    first, second = torch.tensor([[-2.0, 0.0], [-2.0, 2.0]]).to(dtype), torch.tensor([[1.0, 1.0], [3.0, 3.0]]).to(dtype)
    low, high = map(pixels, shown(first, second))
    assert np.array_equal(low, np.round(np.array([[0, 0.4], [0, 0.8]]) * 255))
    assert np.array_equal(high, np.round(np.array([[0.6, 0.6], [1, 1]]) * 255))
    # What has its range already keeps it.
    assert np.array_equal(pixels(shown(torch.from_numpy(GREY), first)[0]), GREY)


floats = st_numpy.arrays(np.float64, (3, 4), elements=st.floats(allow_nan=True, allow_infinity=True))


@given(floats)
def test_whatever_the_numbers(sample):
    (content,) = shown(sample)
    assert pixels(content).shape == (3, 4)


def test_a_picture_of_one_colour_and_one_of_nothing():
    assert len(np.unique(pixels(shown(torch.full((4, 4), 7.0))[0]))) == 1
    assert pixels(shown(torch.full((4, 4), torch.nan))[0]).max() == 0


@pytest.mark.parametrize(
    ("shape", "size"), [((300, 200), (85, 128)), ((64, 1000), (128, 8)), ((8, 8), (8, 8)), ((128, 128), (128, 128))]
)
def test_pictures_are_small(shape, size):
    (content,) = shown(torch.rand(*shape))
    assert (content.width, content.height) == size
    assert max(size) <= WIDEST
    picture = Image.fromarray(np.zeros(shape, np.uint8))
    assert (shown(picture)[0].width, picture.width) == (size[0], shape[1])  # the user's picture is left as it is


def test_flat_samples_are_pictures_only_if_that_is_said():
    flat = torch.from_numpy(GREY).reshape(-1)
    assert shown(flat)[0].text == "0, 10, 20, 30, 40, 50"
    assert np.array_equal(pixels(shown(flat, image_shape=(2, 3))[0]), GREY)
    assert pixels(shown(torch.rand(24), image_shape=(3, 2, 4))[0]).shape == (2, 4, 3)
    (content,) = shown(torch.rand(7), image_shape=(2, 3))
    assert content.note == "could not be read: ValueError: image_shape is (2, 3), but the sample has shape (7,)"


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        ("  a <b>text</b> ", "a <b>text</b>"),
        (("a text", 1), "a text"),
        ({"text": "a text", "label": 0}, "a text"),
        ({"premise": "A.", "hypothesis": "B.", "idx": 3}, "premise: A.\nhypothesis: B."),
        (torch.arange(64) / 3, "0, 0.3333, 0.6667, 1, 1.333, 1.667, 2, 2.333, … (64 numbers)"),
        (torch.zeros(16, 4, 4), "0, 0, 0, 0, 0, 0, 0, 0, … (shape [16, 4, 4])"),
        (torch.ones(1, 9), "1, 1, 1, 1, 1, 1, 1, 1, … (shape [1, 9])"),
        ({"input_ids": torch.tensor([101, 7])}, "101, 7"),
        (2.5, "2.5"),
        (torch.tensor(3), "3"),
        (torch.zeros(0), ""),
    ],
)
def test_texts_and_numbers(sample, text):
    assert shown(sample) == [Content(text=text)]


def test_long_texts_are_cut():
    (content,) = shown("word " * 1000)
    assert len(content.text) <= LONGEST
    assert content.text.endswith("word…")


def test_what_cannot_be_shown_says_so():
    assert shown(object())[0].note == "a object; SampleFacts(describe=...) can say what to show"
    assert shown({"label": 3})[0].note.startswith("a mapping without text or image")


def test_a_sample_that_raises_is_no_reason_to_stop():
    def look(index):
        if index == 1:
            raise OSError("truncated <file>")
        return f"text {index}"

    contents = describe_samples([0, 1, 2], look)
    assert contents[1].note == "could not be read: OSError: truncated <file>"
    assert (contents[0].text, contents[2].text) == ("text 0", "text 2")


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    picture, text = shown(torch.rand(3, 3), "text")
    assert picture.note == 'pictures need Pillow: pip install "kdaif-fast[train]"'
    assert text.text == "text"


def test_items_of_a_data_set_with_indices():
    from typing import NamedTuple

    class IndexedSample(NamedTuple):
        index: int
        sample: object

    assert shown(IndexedSample(7, ("a text", 1)))[0].text == "a text"
