"""compute-sanitizer: what its reports say, and whose kernels they are about."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck", "initcheck")
REFUSAL = re.compile(
    r"Device not supported|not supported on this|Unable to find injection|Target application .*not supported"
)
TOTAL = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
REPORT = re.compile(
    r"^=+ (Invalid|Misaligned|Uninitialized|Error: |Warning: |Race|Program hit|Out-of-range|Host API)(.*)$"
)
PLACE = re.compile(r"^=+\s+(?:at|in|by)?\s*.*?((?:void )?[A-Za-z_][\w:]*(?:<.*>)?(?:\(.*?\))?)\+0x")
LONGEST = 40  # lines of a report
TRITON_KERNEL = re.compile(r"^@triton\.jit.*?^def (\w+)\(", re.MULTILINE | re.DOTALL)


def kernel_names(root: Path) -> set[str]:
    """What the library's kernels are recognised by: the namespace of the compiled ones, the names of Triton's."""
    names = {"kdaif::", "5kdaif"}  # as written, and as mangled
    for path in (root / "kdaif_fast/triton_kernels").glob("*.py"):
        names |= {name for name in TRITON_KERNEL.findall(path.read_text()) if name.endswith("_kernel")}
    return names


def read_log(log: str, code: int | None, ours: set[str]) -> dict[str, Any]:
    """The verdict on one run: "ok", "failed", or "refused", with counts of reports on our kernels and on others'.

    A report that names no kernel counts as ours.
    """
    if REFUSAL.search(log):
        return {"state": "refused the device", "ours": 0, "others": 0}
    found = {"ours": 0, "others": 0}
    first = ""
    lines = log.splitlines()
    for i, line in enumerate(lines):
        if not REPORT.match(line):
            continue
        # A report is a block of lines; the next one begins with its own headline.
        block = [line]
        for following in lines[i + 1 : i + LONGEST]:
            if REPORT.match(following) or not following.startswith("="):
                break
            block.append(following)
        names = [match[1] for text in block if (match := PLACE.match(text))]
        is_ours = any(name in text for text in block for name in ours)
        if not names and "Program hit" in line:  # a call of the driver, of which torch makes some that may fail
            is_ours = any("_kernels_cuda" in text for text in block)
        elif not names:
            is_ours = True
        found["ours" if is_ours else "others"] += 1
        if is_ours and not first:
            first = "\n".join(block)
    totals = [int(next(filter(None, match.groups()), "0")) for match in TOTAL.finditer(log)]
    if not totals:
        return {"state": "failed: it wrote no summary", **found}
    # Reports beyond those that are printed, or in a form not known here, are counted in the summary alone.
    found["unattributed"] = max(max(totals) - found["ours"] - found["others"], 0)
    is_clean = found["ours"] == 0 and found["unattributed"] == 0 and code == 0
    return {"state": "ok" if is_clean else "failed", "first": first, **found}
