"""Samples as something to look at: small pictures, texts, or a few of their numbers."""

from __future__ import annotations

import base64
import io
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

WIDEST = 128  # pixels of a picture, either way
LONGEST = 600  # characters of a text
SHOWN_NUMBERS = 8
IMAGE_KEYS = ("image", "img", "pixel_values")

HOW_TO_SHOW = "SampleFacts(describe=...) can say what to show"


@dataclass(frozen=True)
class Content:
    """What there is to see of a sample: a text, or a picture (PNG, base64) and its size, or a note why neither."""

    text: str | None = None
    image: str | None = None
    width: int = 0
    height: int = 0
    note: str | None = None


def describe_samples(
    indices: Iterable[int], look: Callable[[int], Any], image_shape: tuple[int, ...] | None = None
) -> dict[int, Content]:
    """The contents of these samples.

    A sample is a text; a picture (of Pillow; or [H, W], [1, H, W], [3, H, W] or [H, W, 3]); a mapping with an image, or
    with texts; or an (input, target) pair of one of them. Of anything else a few numbers are shown. Pixels that are not
    uint8 may have any range: the darkest and the brightest of all these pictures become black and white.

    Args:
        indices: of the samples.
        look: gives the sample of an index. What it raises ends up in the sample's note: a picture is worth no run.
        image_shape: how to see flat samples.

    Example:
        >>> contents = describe_samples([3, 5], lambda index: (f"review {index}", 1))
        >>> contents[5].text
        'review 5'
    """
    found: dict[int, Content | np.ndarray | Any] = {}
    for index in indices:
        try:
            found[index] = _seen(look(index), image_shape)
        except Exception as error:
            found[index] = Content(note=f"could not be read: {type(error).__name__}: {error}"[:LONGEST])
    low, high = _range(x for x in found.values() if isinstance(x, np.ndarray) and x.dtype != np.uint8)
    contents = {}
    for index, seen in found.items():
        try:
            contents[index] = seen if isinstance(seen, Content) else _picture(seen, low, high)
        except ImportError:
            contents[index] = Content(note='pictures need Pillow: pip install "kdaif-fast[train]"')
    return contents


def _seen(sample: Any, image_shape: tuple[int, ...] | None) -> Any:
    """A Content, an array of pixels, or a picture of Pillow."""
    if getattr(sample, "_fields", None) == ("index", "sample"):  # of a data set with indices
        sample = sample.sample
    if isinstance(sample, (tuple, list)) and sample:
        sample = sample[0]
    if isinstance(sample, Mapping):
        return _seen_mapping(sample, image_shape)
    if isinstance(sample, str):
        return Content(text=_shortened(sample))
    if _is_pillow(sample):
        return sample
    if isinstance(sample, (int, float)):
        return Content(text=f"{sample:.6g}")
    if isinstance(sample, Tensor):
        sample = sample.detach().cpu()
        sample = sample.float().numpy() if sample.is_floating_point() else sample.numpy()
    if isinstance(sample, (np.ndarray, np.generic)):
        pixels = _pixels(np.asarray(sample), image_shape)
        return Content(text=_some_numbers(np.asarray(sample))) if pixels is None else pixels
    return Content(note=f"a {type(sample).__name__}; {HOW_TO_SHOW}")


def _seen_mapping(sample: Mapping[str, Any], image_shape: tuple[int, ...] | None) -> Any:
    for key in IMAGE_KEYS:
        if sample.get(key) is not None:
            return _seen(sample[key], image_shape)
    texts = {key: value for key, value in sample.items() if isinstance(value, str)}
    if len(texts) == 1:
        return Content(text=_shortened(*texts.values()))
    if texts:
        return Content(text=_shortened("\n".join(f"{key}: {value}" for key, value in texts.items())))
    for value in sample.values():
        if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
            return _seen(value, image_shape)
    return Content(note=f"a mapping without text or image; {HOW_TO_SHOW}")


def _is_pillow(sample: Any) -> bool:
    # Whoever has such a picture has imported Pillow.
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(sample, pillow.Image)


def _pixels(x: np.ndarray, image_shape: tuple[int, ...] | None) -> np.ndarray | None:
    """The array as [H, W] or [H, W, 3]; None if it is no picture."""
    if image_shape is not None:
        if x.size != math.prod(image_shape):
            raise ValueError(f"image_shape is {image_shape}, but the sample has shape {x.shape}")
        x = x.reshape(image_shape)
    if x.ndim == 3 and x.shape[0] in (1, 3):
        x = np.moveaxis(x, 0, -1)
    if x.ndim == 3 and x.shape[-1] == 1:
        x = x[..., 0]
    is_picture = (x.ndim == 2 or (x.ndim == 3 and x.shape[-1] == 3)) and min(x.shape[:2]) > 1
    if not is_picture or x.dtype.kind not in "buif":
        return None
    if x.dtype == bool:
        return np.where(x, np.uint8(255), np.uint8(0))
    return x if x.dtype == np.uint8 else x.astype(np.float64)


def _range(pictures: Iterable[np.ndarray]) -> tuple[float, float]:
    """The darkest and the brightest finite pixel of all."""
    finite = [pixels for x in pictures if (pixels := x[np.isfinite(x)]).size]
    if not finite:
        return 0.0, 1.0
    return float(min(x.min() for x in finite)), float(max(x.max() for x in finite))


def _picture(seen: Any, low: float, high: float) -> Content:
    from PIL import Image

    if isinstance(seen, np.ndarray):
        if seen.dtype != np.uint8:
            # In two halves: high - low may be more than a number can be.
            share = (seen / 2 - low / 2) / ((high / 2 - low / 2) or 1.0)
            seen = np.nan_to_num(255 * share.clip(0, 1)).round().astype(np.uint8)
        seen = Image.fromarray(np.ascontiguousarray(seen))
    elif seen.mode not in ("L", "RGB", "RGBA"):
        seen = seen.convert("RGBA" if seen.mode in ("P", "LA", "PA") else "RGB")
    else:
        seen = seen.copy()  # thumbnail changes its picture
    seen.thumbnail((WIDEST, WIDEST))
    file = io.BytesIO()
    seen.save(file, "PNG", optimize=True)
    return Content(image=base64.b64encode(file.getvalue()).decode("ascii"), width=seen.width, height=seen.height)


def _some_numbers(x: np.ndarray) -> str:
    if x.ndim == 0:
        return f"{x.item()}"
    numbers = ", ".join(f"{value:.4g}" for value in x.reshape(-1)[:SHOWN_NUMBERS].tolist())
    if x.size <= SHOWN_NUMBERS:
        return numbers
    shape = f"{x.size} numbers" if x.ndim == 1 else f"shape {list(x.shape)}"
    return f"{numbers}, … ({shape})"


def _shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST else text[: LONGEST - 1].rstrip() + "…"
