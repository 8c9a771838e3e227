"""The command: runs what is missing, and writes the tables."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from .methods import METHODS, Settings
from .problems import PROBLEMS
from .results import FOLDER, Results
from .run import run
from .tables import all_tables, put_into

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
SEEDS = 5


def run_missing(
    folder: Path, settings: Settings, seeds: list[int], processes: int, problems: list[str], methods: list[str]
) -> None:
    """Do all runs that the folder has no results of."""
    results = {problem: Results(folder, problem, settings) for problem in problems}
    missing = [
        (problem, method, seed)
        for problem in problems
        for seed in seeds
        for method in methods
        if not results[problem].has(method, seed)
    ]
    with tqdm(total=len(missing), unit="run") as bar:
        for found in _outcomes(missing, settings, processes):
            results[found["problem"]].add(found)
            bar.update()


def _outcomes(tasks: list[tuple[str, str, int]], settings: Settings, processes: int) -> Iterator[dict[str, Any]]:
    """What the runs give, as they end."""
    if processes == 1:
        yield from (run(*task, settings) for task in tasks)
        return
    # Started afresh: a fork would share the threads' locks.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, *task, settings) for task in tasks]):
            yield done.result()


def write_page(folder: Path, page: Path) -> None:
    """Put the tables of the results into the page."""
    page.write_text(put_into(page.read_text(), all_tables(folder)))


@click.command()
@click.option("--seeds", default=SEEDS, show_default=True, type=click.IntRange(1), help="runs of each method")
@click.option("--processes", default=2, show_default=True, type=click.IntRange(1), help="at once, of one thread each")
@click.option("--epochs", default=Settings().epochs, show_default=True, type=click.IntRange(2))
@click.option("--problem", "problems", multiple=True, type=click.Choice(list(PROBLEMS)), help="default: all")
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="default: all")
@click.option("--results", "folder", default=FOLDER, type=click.Path(path_type=Path, file_okay=False))
@click.option("--page", default=PAGE, type=click.Path(path_type=Path, exists=True), help="where the tables go")
@click.option("--tables-only", is_flag=True, help="run nothing")
def main(
    seeds: int,
    processes: int,
    epochs: int,
    problems: tuple[str, ...],
    methods: tuple[str, ...],
    folder: Path,
    page: Path,
    tables_only: bool,
) -> None:
    """Run the experiment; finished runs are skipped, and the tables are made from all that there are."""
    if not tables_only:
        settings = Settings(epochs=epochs)
        chosen = list(problems) or [*PROBLEMS], list(methods) or [*METHODS]
        run_missing(folder, settings, list(range(seeds)), processes, *chosen)
    write_page(folder, page)
