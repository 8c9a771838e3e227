"""Peak memory does not grow with the loader, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kdaif_fast

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, to forget a process's peak"),
    pytest.mark.skipif(not BENCHMARKS.exists(), reason="not a source tree"),
]


def test_it_does_not_grow_with_the_loader():
    script = Path(__file__).parent / "memory_of_closed_forms.py"
    path = os.pathsep.join(filter(None, [str(Path(kdaif_fast.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    found = subprocess.run(
        [sys.executable, script, BENCHMARKS],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    measured = json.loads(found.stdout)
    assert len(measured["peaks"]) == 8
    for name, (short, long) in measured["peaks"].items():
        assert short > 0, name
        assert long < short + 2, f"{name}: {short:.1f} MiB for the short loader, {long:.1f} for the long one"
        assert long < 0.25 * measured["gradients"], f"{name}: {long:.1f} MiB"
