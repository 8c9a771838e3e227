"""The page and the summary of a file of results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from .order import ESTIMATES, relative_costs, table_of

MOST_MISSED = 20


def page(results: Mapping[str, Any]) -> str:
    """All of it, in Markdown."""
    lines = [f"# {results['machine'].get('gpu') or 'Rehearsal on the CPU'}", ""]
    if results.get("rehearsal"):
        lines += ["Nothing here is a measurement: sizes are tiny, and no GPU has run anything.", ""]
    lines += _facts(results) + _stages(results)
    found = results.get("benchmarks")
    if found:
        lines += _ceilings(found) + _rows(found) + _skipped(found)
        if not results.get("rehearsal"):
            lines += _orders(results)
        lines += _tunings(found)
    lines += _row_plans(results.get("row plans") or {})
    return "\n".join(lines) + "\n"


def summary(results: Mapping[str, Any]) -> list[str]:
    """A screen of lines: stages, what failed, targets."""
    machine = results["machine"]
    lines = [f"{machine.get('gpu') or 'no GPU'}; torch {machine.get('torch')}; commit {machine.get('commit')}"]
    for name, stage in results["stages"].items():
        counted = _counted(stage)
        lines.append(f"{name:12} {stage['state']}" + (f"; {counted}" if counted else ""))
    failures = [name for stage in results["stages"].values() for name in stage.get("failures", [])]
    lines += [f"  failed: {name}" for name in failures[:10]]
    found = results.get("benchmarks")
    if found:
        lines += [f"ceilings: {_ceiling_text(found['ceilings'])}"]
        if not results.get("rehearsal"):
            lines += _targets(found)
        lines += [f"  WRONG: {_title(row)}, {row['way']}: error {row['error']}" for row in wrong_rows(results)]
        failed = [row for row in found["rows"] if "failed" in row]
        lines += [f"  failed: {_title(row)}, {row['way']}: {row['failed'][:120]}" for row in failed[:8]]
        lines.append(f"passes {found['passes']}; cases skipped for lack of time: {len(found['skipped'])}")
    return lines


def _targets(found: Mapping[str, Any]) -> list[str]:
    """Of what users get: how many targets are met, and which are not."""
    verdicts = [
        (text, met, row) for row in found["rows"] if row.get("answers") for text, met in row.get("targets", {}).items()
    ]
    missed = [(text, row) for text, met, row in verdicts if met is False]
    met = sum(met is True for _, met, _ in verdicts)
    lines = [f"targets: {met} met, {len(missed)} missed, {len(verdicts) - met - len(missed)} not to be said"]
    return lines + [f"  missed: {_title(row)}: {text} ({_measured(row)})" for text, row in missed[:MOST_MISSED]]


def wrong_rows(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The library's own ways whose result differed from the one that counts as right."""
    rows = (results.get("benchmarks") or {}).get("rows", [])
    return [
        row for row in rows if row.get("is_right") is False and row["way"] in ("kdaif_fast", "cuda", "triton", "cpu")
    ]


def time_text(seconds: float | None) -> str:
    """Three digits, in the unit that fits."""
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            return f"{seconds / size:.3g} {unit}"
    return ""


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['case']} {row['shape']} {row['dtype']}"


def _measured(row: Mapping[str, Any]) -> str:
    share = row.get("share")
    return time_text(min(row["seconds"])) + (f", {share:.0%} of its ceiling" if share else "")


def _facts(results: Mapping[str, Any]) -> list[str]:
    facts = {**results["machine"], "started": results.get("started"), "seconds": results.get("seconds")}
    lines = ["| fact | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in facts.items() if value is not None]
    library = results.get("library") or {}
    lines += [
        f"| {name} | {_cell(value)} |"
        for name, value in library.items()
        if name.startswith(("backend", "op ", "order"))
    ]
    return [*lines, ""]


def _cell(value: Any) -> str:
    return str(value).replace("|", "/").replace("\n", "; ")


def _counted(stage: Mapping[str, Any]) -> str:
    names = ("passed", "failed", "error", "skipped", "ours", "others", "unattributed")
    return ", ".join(f"{stage[name]} {_WORDS.get(name, name)}" for name in names if stage.get(name))


_WORDS = {
    "error": "errors",
    "ours": "reports on our kernels",
    "others": "on others'",
    "unattributed": "on nothing named",
}


def _stages(results: Mapping[str, Any]) -> list[str]:
    lines = ["## Stages", "", "| stage | | seconds | |", "|---|---|---:|---|"]
    for name, stage in results["stages"].items():
        lines.append(f"| {name} | {stage['state']} | {stage.get('seconds', 0):.0f} | {_counted(stage)} |")
    lines.append("")
    for name, stage in results["stages"].items():
        if stage.get("failures"):
            lines += [f"Failed in {name}:", "", *(f"- `{test}`" for test in stage["failures"]), ""]
        if stage.get("skip_reasons"):
            reasons = sorted(stage["skip_reasons"].items(), key=lambda item: -item[1])
            lines += [f"Skipped in {name}:", "", *(f"- {count}: {_cell(why)}" for why, count in reasons), ""]
        if stage.get("tail") and stage["state"] != "ok":
            lines += [f"The end of {name}'s output:", "", "```", *stage["tail"], "```", ""]
    return lines


def _ceiling_text(ceilings: Mapping[str, float]) -> str:
    units = {"copy": (1e12, "TB/s"), "bf16": (1e12, "TFLOP/s"), "tf32": (1e12, "TFLOP/s"), "float32": (1e12, "TFLOP/s")}
    return ", ".join(f"{name} {value / units[name][0]:.3g} {units[name][1]}" for name, value in ceilings.items())


def _ceilings(found: Mapping[str, Any]) -> list[str]:
    text = "Copies count bytes read and bytes written; matrix products are 8192^3 of random numbers."
    return ["## Ceilings", "", f"{_ceiling_text(found['ceilings'])}. {text}", ""]


def _rows(found: Mapping[str, Any]) -> list[str]:
    text = (
        "time: what the GPU needs, the median of the better pass (steps and weights: until the result is there). "
        "asking: what the CPU needs to ask for it. share: of the floor at the ceilings above. A star: what a user gets."
    )
    lines = ["## Measurements", "", text, ""]
    head = "| shape | dtype | way | time | asking | kernels | share | passes differ | error | target |"
    for case, rows in _groups(found["rows"]):
        lines += [f"### {case}", "", head, "|---|---|---|---:|---:|---:|---:|---:|---:|---|"]
        lines += [_line(row) for row in rows]
        lines.append("")
    return lines


def _groups(rows: list[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    names = dict.fromkeys(row["case"] for row in rows)
    for name in names:
        yield name, [row for row in rows if row["case"] == name]


def _line(row: Mapping[str, Any]) -> str:
    way = row["way"] + (" *" if row.get("answers") else "")
    begin = f"| {row['shape']} | {row['dtype']} | {way} |"
    if "seconds" not in row:
        return f"{begin} {_cell(row.get('skipped') or row.get('failed') or '')} | | | | | | |"
    share, error = row.get("share"), row.get("error")
    verdicts = {True: "met", False: "MISSED", None: "?"}
    targets = [f"{text}: {verdicts[met]}" for text, met in row.get("targets", {}).items()]
    if row.get("peak") is not None:
        targets.append(f"peak {row['peak'] / 2**20:.0f} MiB of {row['peak_stated'] / 2**20:.0f} stated")
    cells = (
        time_text(min(row["seconds"])),
        time_text(row["asking"]),
        "" if row.get("kernels") is None else str(row["kernels"]),
        "" if not share or share > 10 else f"{share:.0%}",
        f"{row.get('spread', 0):.1%}" if len(row["seconds"]) > 1 else "",
        ("" if error is None else f"{error:.1e}") + (" WRONG" if row.get("is_right") is False else ""),
        "; ".join(targets),
    )
    return f"{begin} " + " | ".join(cells) + " |"


def _skipped(found: Mapping[str, Any]) -> list[str]:
    if not found["skipped"]:
        return []
    return ["Not measured, as the time was over:", "", *(f"- {title}" for title in found["skipped"]), ""]


def _orders(results: Mapping[str, Any]) -> list[str]:
    """The order that follows, and what an installation without nvcc loses."""
    lines = ["## Order of kernels that follows", ""]
    lines += ["| op | size | order | Triton alone, times the best |", "|---|---|---|---:|"]
    rows, table = results["benchmarks"]["rows"], table_of(results)
    for op in ESTIMATES:
        for size, order in table[op].items():
            costs = relative_costs(rows, op, size)
            best = min((value for value in costs.values()), default=math.inf)
            loss = f"{costs['triton'] / best:.2f}" if "triton" in costs and math.isfinite(best) else ""
            lines.append(f"| {op} | {size} | {', '.join(order)} | {loss} |")
    return [*lines, ""]


def _row_plans(plans: Mapping[str, Any]) -> list[str]:
    """Time and share of the ceiling of each case under each plan."""
    if not plans:
        return []
    found = {plan: {_title(row): row for row in rows if row["way"] != "reference"} for plan, rows in plans.items()}
    titles = dict.fromkeys(title for rows in found.values() for title in rows)
    lines = ["## Plans of the row kernels", "", f"| case | {' | '.join(plans)} |", "|---|" + "---:|" * len(plans)]
    for title in titles:
        cells = []
        for rows in found.values():
            row = rows.get(title, {})
            wrong = " WRONG" if row.get("is_right") is False else ""
            cells.append((_measured(row) if "seconds" in row else row.get("failed", "")) + wrong)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return [*lines, ""]


def _tunings(found: Mapping[str, Any]) -> list[str]:
    if not found["tunings"]:
        return []
    lines = ["## Configurations of Triton's kernels", "", "Each candidate's time, the best one first.", ""]
    lines += ["| kernel | case | configuration | ms |", "|---|---|---|---:|"]
    for tuning in found["tunings"]:
        ranked = sorted(tuning["milliseconds"].items(), key=lambda item: (item[1] is None, item[1]))
        for config, time in ranked:
            shown = "does not fit" if time is None else f"{time:.4g}"
            lines.append(f"| {tuning['kernel']} | {tuning['case']} | {_cell(config)} | {shown} |")
    return [*lines, ""]
