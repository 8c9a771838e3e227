"""What all benchmarks share: thread counts, and the table of ratios, which is what to read on a noisy machine."""

import pytest
import torch

OURS = "kdaif_fast"


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def measure(benchmark, threads):
    """Times one row of a group: `measure(group, name, function)`. The rows of a group do the same work.

    peak_mib: what the row needs in memory, if that was measured.
    """

    def run(group, name, function, **peak_mib):
        benchmark.group = f"{group}, {threads} thread{'s' if threads > 1 else ''}"
        benchmark.extra_info.update(name=name, threads=threads, torch=torch.__version__, **peak_mib)
        benchmark(function)

    return run


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    groups = {}
    for bench in getattr(session, "benchmarks", []):
        groups.setdefault(bench.group, {})[bench.extra_info["name"]] = bench
    if not groups:
        return
    say = terminalreporter.write_line
    say("")
    say(f"medians of one run; torch {torch.__version__}; the ratio is to {OURS}")
    say("")
    say("| work | implementation | median, ms | times slower | peak, MiB |")
    say("|---|---|---:|---:|---:|")
    for group, rows in sorted(groups.items()):
        for name, row in rows.items():
            median, peak = row.stats.median, row.extra_info.get("peak_mib")
            ratio = f"{median / rows[OURS].stats.median:.1f}" if OURS in rows else ""
            say(f"| {group} | {name} | {1e3 * median:.3g} | {ratio} | {'' if peak is None else f'{peak:.0f}'} |")
