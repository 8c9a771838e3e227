"""What the report says, and its HTML."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ..run_log import LOG
from ..samples_file import ARRAYS, Samples, read_samples
from . import figures
from .cards import cards
from .groups import ERRORS, FEWEST, SHARE, group_weights
from .numbers_as_text import decimals, number, percent, seconds_text, signed
from .svg import inline_svg, style

SETTINGS = "run.json"
ROWS, REFRESHES = 40, 20
"""Of classes and groups, and of refreshes, that are shown at once; the others are in a part of the page that opens."""

NEEDED = 'the report needs jinja2 and matplotlib: pip install "kdaif-fast[train]"'


def page(folder: Path, records: Sequence[Mapping[str, Any]]) -> str:
    """The page as one HTML text."""
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup

        with style():
            drawn = _drawn([record for record in records if record["kind"] == "epoch"])
    except ImportError as error:
        raise ImportError(NEEDED) from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": number,
        "decimals": decimals,
        "percent": percent,
        "signed": signed,
        "seconds": seconds_text,
    }
    template = environment.from_string(_part("page.html"))
    # Ours, and matplotlib's, which escapes texts itself: what users have named is in neither.
    trusted = {"css": Markup(_part("page.css")), "figures": {name: Markup(svg) for name, svg in drawn.items()}}
    return template.render(**trusted, **_contents(folder, records))


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _contents(folder: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    epochs = [record for record in records if record["kind"] == "epoch"]
    refreshes = [record for record in records if record["kind"] == "refresh"]
    samples = read_samples(folder) if (folder / ARRAYS).exists() else None
    written = datetime.datetime.fromtimestamp((folder / LOG).stat().st_mtime)
    return {
        "name": folder.resolve().name,
        "written": f"{written:%Y-%m-%d %H:%M}",
        "epochs": epochs,
        "last": epochs[-1] if epochs else {},
        "facts": _key_facts(epochs),
        "chosen": [record["epoch"] for record in figures.start_middle_end(epochs)],
        "knows_flips": any("flip_auc" in record for record in epochs),
        "refreshes": refreshes,
        "rows": ROWS,
        "last_refreshes": REFRESHES,
        "samples": samples,
        "harmful": cards(samples, samples.harmful(samples.top)) if samples else [],
        "helpful": cards(samples, samples.helpful(samples.top)) if samples else [],
        "tables": _tables(samples) if samples else [],
        "rule": {"errors": ERRORS, "share": SHARE, "fewest": FEWEST},
        "settings": _settings(folder / SETTINGS),
    }


def _drawn(epochs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The figures that there are data for, by name."""
    titles = {
        "accuracy": ("Accuracy over the epochs", figures.accuracy_figure(epochs)),
        "loss": ("Training loss over the epochs", figures.loss_figure(epochs)),
        "detection": ("Flipped labels found by the weights, over the epochs", figures.detection_figure(epochs)),
        "bands": ("Quantiles of the weights over the epochs", figures.band_figure(epochs)),
        "histograms": (
            "Histograms of the weights at the start, in the middle and at the end",
            figures.histogram_figure(figures.start_middle_end(epochs)),
        ),
        "time": ("Seconds of each part of an epoch", figures.time_figure(epochs)),
    }
    return {name: inline_svg(figure, name, title) for name, (title, figure) in titles.items() if figure is not None}


def _key_facts(epochs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Name, figure and explanation of what one wants to know first."""
    if not epochs:
        return []
    last = epochs[-1]
    facts = []
    for network in ("student", "teacher"):
        validation, test = f"{network}_accuracy", f"test_{network}_accuracy"
        told = [(last[key], what) for key, what in ((test, "test"), (validation, "validation")) if _has(last, key)]
        if told:
            first, *others = told
            also = [f"{what} {percent(value)}" for value, what in others]
            if _has(last, validation):
                also.append(f"best validation {percent(_best(epochs, validation))}")
            facts.append(_fact(f"{network}, {first[1]} accuracy", percent(first[0]), "; ".join(also)))
    if _has(last, "mean_weight"):
        facts.append(_fact("mean weight", decimals(last["mean_weight"]), "over all training samples; 1 is neutral"))
    if _has(last, "share_below_1"):
        facts.append(_fact("samples with w < 1", percent(last["share_below_1"]), "harmful, as far as was measured"))
    if _has(last, "flip_auc"):
        detail = (
            f"w < 1: {percent(last.get('flipped_below_1'))} of flipped, {percent(last.get('clean_below_1'))} of clean"
        )
        facts.append(_fact("AUC of finding flipped labels", decimals(last["flip_auc"]), detail))
    influence, total = _time_spent(epochs)
    if total > 0:
        detail = f"{seconds_text(influence)} of {seconds_text(total)}"
        facts.append(_fact("time spent on influence", percent(influence / total), detail))
    return facts


def _time_spent(epochs: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Seconds of influence, and of everything."""
    spent = [pair for record in epochs for pair in (record.get("seconds") or {}).items() if math.isfinite(pair[1])]
    return sum(seconds for part, seconds in spent if part == "influence"), sum(seconds for _, seconds in spent)


def _fact(name: str, value: str, detail: str) -> dict[str, str]:
    return {"name": name, "value": value, "detail": detail}


def _has(record: Mapping[str, Any], key: str) -> bool:
    return record.get(key) is not None


def _best(epochs: Sequence[Mapping[str, Any]], key: str) -> float:
    finite = [record[key] for record in epochs if _has(record, key) and math.isfinite(record[key])]
    return max(finite, default=math.nan)


def _tables(samples: Samples) -> list[dict[str, Any]]:
    """The weights by class, and by group."""
    tables: list[dict[str, Any]] = []
    if samples.targets is not None:
        rows = group_weights(samples.weights, samples.targets, samples.class_name, samples.flipped)
        tables.append({"title": "By class", "what": "class (label as given)", "rows": rows})
    if samples.groups is not None:
        rows = group_weights(samples.weights, samples.groups, samples.group_names.__getitem__, samples.flipped)
        tables.append({"title": "By group", "what": "group", "rows": rows})
    weights = samples.weights[samples.weights.isfinite()].double()
    for table in tables:
        table["overall"] = float(weights.mean()) if len(weights) else math.nan
        table["scale"] = max([1.0, *(row.mean for row in table["rows"])])
        table["left_out"] = int((~samples.weights.isfinite()).sum())
        table["flips"] = samples.flipped is not None and bool(torch.any(samples.flipped))
    return tables


def _settings(path: Path) -> list[tuple[str, str]] | str | None:
    """The settings by flat names; a sentence where they cannot be read; None where there are none."""
    if not path.exists():
        return None
    try:
        return list(_flat(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:
        return f"{SETTINGS} cannot be read: {error}"


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        parts = (_flat(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items())
        return [pair for part in parts for pair in part]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [(name or "settings", text if len(text) <= 300 else text[:299] + "…")]
