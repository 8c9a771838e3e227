"""Where a package is missing that only some tests need, these are skipped, and say so."""

from __future__ import annotations

import doctest
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

# What pyproject.toml asks for besides torch, in all its extras: a machine with GPUs may have none of it.
MAY_BE_MISSING = {
    *("numpy", "tqdm", "click", "tomli", "triton"),
    *("hypothesis", "scipy", "sklearn", "matplotlib", "jinja2", "PIL", "safetensors"),
    *("accelerate", "datasets", "lightning", "transformers", "tensorboard"),
    *("opacus", "backpack", "curvlinops", "einops", "unfoldNd", "einconv", "linear_operator"),
}


def missing_package(error: BaseException | None) -> str | None:
    """The package whose absence an error comes from, if it is one that may be missing."""
    while error is not None:
        if isinstance(error, doctest.UnexpectedException):
            error = error.exc_info[1]
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.split(".")[0]
            if package in MAY_BE_MISSING and importlib.util.find_spec(package) is None:
                return package
        if "Numpy is not available" in str(error) and importlib.util.find_spec("numpy") is None:
            return "numpy"
        error = error.__cause__ or getattr(error, "cause", None) or error.__context__
    return None


def _skipped_if_missing(report: Any, call: pytest.CallInfo[Any] | None, place: tuple[str, int]) -> None:
    package = missing_package(call.excinfo.value) if call is not None and call.excinfo is not None else None
    if package is not None and report.outcome == "failed":
        report.outcome, report.longrepr = "skipped", (*place, f"Skipped: {package} is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """For what imports such a package at its top."""
    report = yield
    _skipped_if_missing(report, getattr(report, "call", None), (str(collector.path), 1))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    """For what imports it while it runs."""
    report = yield
    _skipped_if_missing(report, call, (str(item.path), (item.location[1] or 0) + 1))
    return report
