"""The tables of docs/results.md, made from the files of results alone."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .methods import MECHANISMS, METHODS
from .problems import PROBLEMS
from .results import read

Run = dict[str, Any]
Rows = dict[str, dict[int, Run]]
"""Method -> seed -> run."""

HEAD = (
    *("method", "student, %", "minus vanilla", "gap closed", "teacher, %"),
    *("AUC", "flips w < 1", "clean w < 1", "time, x online", "of it influence"),
)
CLAIMS_HEAD = ("problem", "mechanism", "minus vanilla", "minus online", "gap to the oracle closed", "AUC")


def rows_of(folder: Path, problem: str) -> Rows:
    """The runs of a problem, of those methods that there are any of."""
    content = read(folder / f"{problem}.json")
    rows: Rows = {}
    for run in [] if content is None else content["runs"]:
        rows.setdefault(run["method"], {})[run["seed"]] = run
    return {name: rows[name] for name in METHODS if name in rows}


def all_tables(folder: Path) -> dict[str, str]:
    """Name -> Markdown, of every table that there are results for."""
    found = {}
    for problem in PROBLEMS:
        rows = rows_of(folder, problem)
        if rows:
            found[problem] = _problem_table(rows)
    if found:
        found["claims"] = _claims_table(folder)
        found["made-with"] = _made_with(folder)
    return found


def put_into(text: str, tables: dict[str, str]) -> str:
    """The text with each table between its marks, `<!-- table NAME -->` and `<!-- end -->`, put in anew."""

    def fresh(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in tables:
            return match.group(0)
        return f"<!-- table {name} -->\n{tables[name]}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", fresh, text, flags=re.DOTALL)


def _problem_table(rows: Rows) -> str:
    has_rare = any("rare_weight" in run for runs in rows.values() for run in runs.values())
    head = (*HEAD[:5], "mean w, rare", "mean w, others", *HEAD[8:]) if has_rare else HEAD
    return _table(head, [_row(name, rows, has_rare) for name in rows])


def _row(name: str, rows: Rows, has_rare: bool) -> list[str]:
    runs = rows[name].values()
    kept = ("rare_weight", "other_weight") if has_rare else ("flip_auc", "flipped_below_1", "clean_below_1")
    known: Iterable[str] = [] if name == "oracle" and not has_rare else kept  # given by the flips, found by nobody
    return [
        METHODS[name].title,
        _spread(100 * run["student"] for run in runs),
        "" if name == "vanilla" else _spread(differences(rows, name, "vanilla"), sign="+"),
        _share(gap_closed(rows, name)) if name not in ("vanilla", "oracle") else "",
        _spread(100 * run["teacher"] for run in runs),
        *(_mean((run[key] for run in runs if key in run), 2) if key in known else "" for key in kept),
        _mean(time_ratios(rows, name), 2),
        _share(influence_share(rows, name)),
    ]


def _claims_table(folder: Path) -> str:
    lines = []
    for problem in PROBLEMS:
        rows = rows_of(folder, problem)
        for name in MECHANISMS:
            if name in rows:
                gaps = [_share(gap_closed(rows, name, base)) for base in ("vanilla", "online")]
                aucs = [run["flip_auc"] for run in rows[name].values() if "flip_auc" in run]
                lines.append(
                    [
                        problem,
                        name,
                        *(_spread(differences(rows, name, base), sign="+") for base in ("vanilla", "online")),
                        f"{gaps[0]}, {gaps[1]}" if any(gaps) else "",
                        f"{min(aucs):.2f} - {max(aucs):.2f}" if aucs else "",
                    ]
                )
    return _table(CLAIMS_HEAD, lines)


def _made_with(folder: Path) -> str:
    contents = [read(folder / f"{problem}.json") for problem in PROBLEMS]
    told = {", ".join(f"{k} {v}" for k, v in content["versions"].items()) for content in contents if content}
    seeds = sorted({run["seed"] for content in contents if content for run in content["runs"]})
    return f"Seeds {', '.join(map(str, seeds))}; {'; '.join(sorted(told))}."


def differences(rows: Rows, name: str, base: str) -> list[float]:
    """The students' accuracies minus those of another method, seed by seed, in points."""
    if base not in rows:
        return []
    return [100 * (run["student"] - rows[base][s]["student"]) for s, run in rows[name].items() if s in rows[base]]


def gap_closed(rows: Rows, name: str, base: str = "vanilla") -> float | None:
    """How far the mean comes on the way from the base to the oracle; None where that is less than half a point."""
    if "oracle" not in rows or base not in rows:
        return None
    here, bottom, top = (statistics.mean(r["student"] for r in rows[key].values()) for key in (name, base, "oracle"))
    return (here - bottom) / (top - bottom) if top - bottom >= 0.005 else None


def time_ratios(rows: Rows, name: str) -> list[float]:
    """Seconds of a run in those of online KD with the same seed."""
    online = rows.get("online", {})
    return [seconds_of(run) / seconds_of(online[seed]) for seed, run in rows[name].items() if seed in online]


def influence_share(rows: Rows, name: str) -> float | None:
    """The share of the time that measuring takes; None where nothing is measured."""
    runs = rows[name].values()
    share = sum(run["seconds"]["influence"] for run in runs) / sum(map(seconds_of, runs))
    return share or None


def seconds_of(run: Run) -> float:
    """All of a run's, without evaluation."""
    return float(sum(run["seconds"].values()))


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def _spread(values: Iterable[float], sign: str = "") -> str:
    found = list(values)
    if not found:
        return ""
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):{sign}.1f}{spread}"


def _mean(values: Iterable[float], digits: int) -> str:
    found = [value for value in values if not math.isnan(value)]
    return f"{statistics.mean(found):.{digits}f}" if found else ""


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"
