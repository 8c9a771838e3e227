"""PEP 517 backend: setuptools', except that what a build requires depends on what the machine already has."""

from __future__ import annotations

from typing import Any

from environment import TORCH_FOR_BUILDING, find_cxx, find_torch, wanted_build
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks not defined below are setuptools' own


def _requirements() -> list[str]:
    if wanted_build() == "none" or find_cxx() is None:
        return []
    torch = find_torch()
    headers = [] if torch and torch.can_build_kernels() else [TORCH_FOR_BUILDING]
    return ["cmake>=3.26", "ninja", "pybind11>=3", *headers]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """CMake, Ninja and pybind11 where there is a compiler; torch only where the target environment has none."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _requirements()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """As for a wheel."""
    return build_meta.get_requires_for_build_editable(config_settings) + _requirements()
