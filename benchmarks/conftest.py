"""What all benchmarks share: thread counts, and the tables of ratios, which are what to read on a noisy machine."""

import statistics
import time

import pytest
import torch

OURS = "kdaif_fast"
SECONDS = 1.0  # for a row of `measure_in` and its reference together


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _grouped(group, threads):
    return f"{group}, {threads} thread{'s' if threads > 1 else ''}"


@pytest.fixture
def measure(benchmark, threads):
    """Times one row of a group: `measure(group, name, function)`. The rows of a group do the same work.

    peak_mib: what the row needs in memory, if that was measured.
    """

    def run(group, name, function, **peak_mib):
        benchmark.group = _grouped(group, threads)
        benchmark.extra_info.update(name=name, threads=threads, torch=torch.__version__, **peak_mib)
        benchmark(function)

    return run


@pytest.fixture
def measure_in(benchmark, threads):
    """Times one row in turns with a reference: `measure_in(unit, reference, group, name, function)`.

    The ratio is the median over rounds of a row's time and that of the reference just before it, so what else the
    machine does falls on both. One thread is timed by its own CPU clock, two by the wall's. Returns the ratio.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter

    def seconds(function):
        start = clock()
        function()
        return clock() - start

    def run(unit, reference, group, name, function, **peak_mib):
        benchmark.group = _grouped(group, threads)
        for _ in range(2):
            seconds(reference)
        once = min(seconds(function) for _ in range(2)) + seconds(reference)
        ratios, times = [], []

        def before():
            times.append(seconds(reference))

        def row():
            ratios.append(seconds(function) / times[-1])

        rounds = min(60, max(5, round(SECONDS / once)))
        benchmark.pedantic(row, setup=before, rounds=rounds, iterations=1)
        ratio = statistics.median(ratios)
        benchmark.extra_info.update(
            name=name, threads=threads, torch=torch.__version__, unit=unit, ratio=ratio, **peak_mib
        )
        return ratio

    return run


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    groups = {}
    for bench in getattr(session, "benchmarks", []):
        groups.setdefault((bench.extra_info.get("unit"), bench.group), {})[bench.extra_info["name"]] = bench
    for unit in sorted({unit for unit, _ in groups}, key=str):
        rows = {group: rows for (other, group), rows in sorted(groups.items(), key=str) if other == unit}
        for line in _table(unit, rows):
            terminalreporter.write_line(line)


def _table(unit, groups):
    """unit: the reference that rows were measured in turns with; None where the ratio is to this library's row."""
    yield ""
    yield f"medians of one run; torch {torch.__version__}; the ratio is to {unit or OURS}"
    yield ""
    yield f"| work | implementation | median, ms | {unit or 'times slower'} | peak, MiB |"
    yield "|---|---|---:|---:|---:|"
    for group, rows in groups.items():
        for name, row in rows.items():
            median, peak = row.stats.median, row.extra_info.get("peak_mib")
            if unit:
                ratio = f"{row.extra_info['ratio']:.2f}"
            else:
                ratio = f"{median / rows[OURS].stats.median:.1f}" if OURS in rows else ""
            yield f"| {group} | {name} | {1e3 * median:.3g} | {ratio} | {'' if peak is None else f'{peak:.0f}'} |"
