"""Pictures as tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...._config import Importer, Section

KEYS = ("size", "channels", "mean", "std", "transform", "train_transform")


@dataclass(frozen=True)
class ImageOptions:
    """How pictures are read."""

    section: Section
    size: tuple[int, int] | None
    channels: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    transform: str | None
    train_transform: str | None


def read_images(section: Section) -> ImageOptions:
    """The keys that are about pictures, checked."""
    size = section.numbers("size", None)
    if size is not None and (len(size) != 2 or not all(type(side) is int and side > 0 for side in size)):
        raise section.wrong("size", "expected [height, width] in pixels")
    channels = section.choice("channels", (1, 3), None)
    mean, std = section.numbers("mean", None), section.numbers("std", None)
    for key, given in (("mean", mean), ("std", std)):
        if given is not None and len(given) not in ((1, 3) if channels is None else (1, channels)):
            raise section.wrong(key, f"expected a number for each channel: {channels or '1 or 3'}")
    if std is not None and min(std) <= 0:
        raise section.wrong("std", "expected numbers > 0")
    transforms = {}
    for key in ("transform", "train_transform"):
        transforms[key] = section.text(key, None)
        if transforms[key] is not None and ":" not in transforms[key]:
            raise section.wrong(key, "expected 'module:function' or 'file.py:function'")
    return ImageOptions(
        section,
        None if size is None else (size[0], size[1]),
        channels,
        None if mean is None else tuple(mean),
        None if std is None else tuple(std),
        **transforms,
    )


class ImageReader:
    """A picture as float32 [C, H, W] from 0 to 1, less the mean, divided by the standard deviation, if they are given.

    Args:
        options: size, channels, mean and std.
        transform: what is done to the picture first. If it returns a tensor, that is left as it is.
    """

    def __init__(self, options: ImageOptions, transform: Callable[[Any], Any] | None = None) -> None:
        self.size, self.channels, self.transform = options.size, options.channels, transform
        self.mean, self.std = (
            None if numbers is None else torch.tensor(numbers).view(-1, 1, 1) for numbers in (options.mean, options.std)
        )

    def __call__(self, picture: Any) -> Tensor:
        """The tensor: of a picture of Pillow; of an array [H, W], [H, W, C] or [C, H, W], which keeps its size."""
        if self.transform is not None:
            picture = self.transform(picture)
            if isinstance(picture, Tensor):
                return picture
        x = self._scaled(self._pixels(picture))
        if self.mean is not None:
            x = x - self.mean
        return x if self.std is None else x / self.std

    def _pixels(self, picture: Any) -> Any:
        if hasattr(picture, "convert"):  # one of Pillow
            mode = {1: "L", 3: "RGB"}.get(self.channels or 0, "L" if picture.mode in ("1", "L", "I;16") else "RGB")
            picture = picture.convert(mode)
            if self.size is not None:
                from PIL import Image

                picture = picture.resize(self.size[::-1], Image.Resampling.BILINEAR)
            return np.array(picture)
        return picture

    @staticmethod
    def _scaled(pixels: Any) -> Tensor:
        x = torch.as_tensor(pixels)
        x = x.float() if x.is_floating_point() else x.float() / 255
        if x.dim() == 2:
            return x[None]
        return x if x.shape[0] in (1, 3) else x.permute(2, 0, 1).contiguous()


class Pictured:
    """From an item of a data set to (tensor, label)."""

    def __init__(self, reader: ImageReader, image: Any = 0, label: Any = 1) -> None:
        self.reader, self.image, self.label = reader, image, label

    def __call__(self, item: Any) -> tuple[Tensor, int]:
        """The item at places or keys `image` and `label`."""
        return self.reader(item[self.image]), int(item[self.label])


def readers(options: ImageOptions, importer: Importer) -> tuple[ImageReader, ImageReader]:
    """How training pictures are read, and how others."""
    section = options.section
    plain = _transform(section, "transform", options.transform, importer)
    training = _transform(section, "train_transform", options.train_transform, importer)
    return ImageReader(options, training or plain), ImageReader(options, plain)


def _transform(section: Section, key: str, name: str | None, importer: Importer) -> Any:
    """The function of that name; a class, ToTensor say, is called without arguments first."""
    if name is None:
        return None
    function = importer.function(section.label(key), name)
    return importer.call(section.label(key), name, {}) if inspect.isclass(function) else function
