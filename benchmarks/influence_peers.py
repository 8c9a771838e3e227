"""Influence scores by this library and by others on the same problem: time, agreement with the exact answer, use.

    python benchmarks/bench_influence.py [--network mlp cnn] [--only NAME ...] [--peers FOLDER] [--damping NUMBER]

Every row gets the same trained model, samples and damping (those that take one). Times are CPU seconds of the whole
process on one thread, from the model to phi, model and data given; fast rows in turns with ours, median; slow once.
Peers are imported from FOLDER if they are not installed (benchmarks/peers.txt; `make bench-peers`).
"""

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from baselines.captum_influence import arnoldi_scores, tracin_scores
from baselines.dattri_influence import dattri_influence_scores
from baselines.func_influence import func_influence_scores
from baselines.kronfluence_influence import kronfluence_influence_scores
from baselines.naive_influence import naive_influence_scores
from baselines.plain_mlp_influence import plain_influence_scores
from baselines.pydvl_influence import pydvl_influence_scores
from baselines.torch_influence_scores import torch_influence_scores
from influence_problem import EPOCHS, NETWORKS, Problem, exact_scores, make_problem
from scipy.stats import spearmanr
from torch import Tensor

from kdaif_fast import influence_scores

RUNS = Path(__file__).parents[1] / "runs"
ONCE, REPEATS, MAX_ITER = 4.0, 7, 2000
OURS = "kdaif_fast, tol 1e-2"


@dataclass(frozen=True)
class Row:
    """One way to scores: `scores(problem)`, the package it needs, the networks that it can take."""

    name: str
    scores: Callable[[Problem], Tensor]
    package: str | None = None
    networks: tuple[str, ...] = tuple(NETWORKS)


def _ours(**options):
    def scores(p: Problem) -> Tensor:
        return influence_scores(p.model, p.batch, p.val, damping=p.damping, max_iter=MAX_ITER, **options)

    return scores


def _with(function, *, damping: bool = True, **options):
    def scores(p: Problem) -> Tensor:
        return function(p.model, p.batch, p.val, **({"damping": p.damping} if damping else {}), **options)

    return scores


ROWS = [
    Row("kdaif_fast, tol 1e-4", _ours(tol=1e-4)),
    Row(OURS, _ours(tol=1e-2)),
    Row('kdaif_fast, tol "rank"', _ours(tol="rank")),
    Row("kdaif_fast, tol 3e-2", _ours(tol=3e-2)),
    Row("plain matrix products, CG to 1e-4", _with(plain_influence_scores, tol=1e-4), networks=("mlp",)),
    Row("plain matrix products, CG to 1e-2", _with(plain_influence_scores, tol=1e-2), networks=("mlp",)),
    Row("torch.func jvp + vjp, CG to 1e-4", _with(func_influence_scores, tol=1e-4)),
    Row("torch.func jvp + vjp, CG to 1e-2", _with(func_influence_scores, tol=1e-2)),
    Row(
        "naive loop, Gauss-Newton, CG to 1e-4",
        _with(naive_influence_scores, tol=1e-4, max_iter=MAX_ITER, curvature="ggn"),
    ),
    Row(
        "naive loop, Gauss-Newton, CG to 1e-2",
        _with(naive_influence_scores, tol=1e-2, max_iter=MAX_ITER, curvature="ggn"),
    ),
    Row("naive loop, Hessian, CG to 1e-4", _with(naive_influence_scores, tol=1e-4, max_iter=500)),
    Row("torch-influence, Gauss-Newton, CG to 1e-4", _with(torch_influence_scores, tol=1e-4), "torch_influence"),
    Row("torch-influence, Gauss-Newton, CG to 1e-2", _with(torch_influence_scores, tol=1e-2), "torch_influence"),
    Row(
        "pyDVL, Hessian, CG to 1e-2, 200 steps at most", _with(pydvl_influence_scores, tol=1e-2, max_iter=200), "pydvl"
    ),
    Row(
        "dattri, Hessian, CG to 1e-2, 200 steps at most",
        _with(dattri_influence_scores, tol=1e-2, max_iter=200),
        "dattri",
    ),
    Row(
        "dattri, Hessian, CG, its default of 10 steps", _with(dattri_influence_scores, tol=1e-7, max_iter=10), "dattri"
    ),
    Row("captum, Arnoldi", _with(arnoldi_scores), "captum"),
    Row("captum, TracInCPFast", _with(tracin_scores, damping=False), "captum"),
    Row("kronfluence, EK-FAC", _with(kronfluence_influence_scores), "kronfluence"),
    Row("kronfluence, K-FAC", _with(kronfluence_influence_scores, strategy="kfac"), "kronfluence"),
]


def _seconds(row: Row, problem: Problem) -> tuple[float, Tensor]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        start = time.process_time()
        phi = row.scores(problem)
        return time.process_time() - start, phi.detach()


def auc(phi: Tensor, flipped: Tensor) -> float:
    """The probability that a wrong label has a larger phi than a right one."""
    wrong, right = phi[flipped].double(), phi[~flipped].double()
    above = (wrong[:, None] > right).double() + 0.5 * (wrong[:, None] == right)
    return float(above.mean())


def measure(row: Row, ours: Row, problem: Problem, exact: Tensor) -> dict:
    """One row of the table; ours is run in turns with it."""
    seconds, phi = _seconds(row, problem)
    times, references = [seconds], [_seconds(ours, problem)[0]]
    if seconds < ONCE:  # the first call paid for imports and the like
        times, references = [], []
        for _ in range(REPEATS):
            references.append(_seconds(ours, problem)[0])
            times.append(_seconds(row, problem)[0])
    else:
        references = [_seconds(ours, problem)[0] for _ in range(3)]
        references = [statistics.median(references)]
    ratio = statistics.median(t / r for t, r in zip(times, references, strict=True))
    phi = phi.double()
    return {
        "name": row.name,
        "seconds": statistics.median(times),
        "runs": len(times),
        "ratio": ratio,
        "spearman": float(spearmanr(phi, exact).statistic),
        "pearson": float(torch.corrcoef(torch.stack([phi, exact]))[0, 1]),
        "scale": float(phi.norm() / exact.norm()),
        "auc": auc(phi, problem.flipped),
    }


def table(network: str, problem: Problem, rows: list[dict], exact: Tensor) -> str:
    parameters = sum(p.numel() for p in problem.model.parameters())
    lines = [
        f"{network}: P = {parameters:,}, N = {len(problem.flipped):,}, damping {problem.damping:.3g}; torch "
        f"{torch.__version__}, one thread; ratio to {OURS}; AUC of the exact scores {auc(exact, problem.flipped):.3f}",
        "",
        "| scores by | CPU seconds (runs) | times slower | Spearman | Pearson | size / exact | AUC on flips |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        if "skipped" in r:
            lines.append(f"| {r['name']} | skipped: {r['skipped']} | | | | | |")
        else:
            lines.append(
                f"| {r['name']} | {r['seconds']:.3g} ({r['runs']}) | {r['ratio']:.2f} | {r['spearman']:.4f} | "
                f"{r['pearson']:.4f} | {r['scale']:.3g} | {r['auc']:.3f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--peers", type=Path, help="a folder that peers were installed into")
    parser.add_argument("--damping", type=float, help='for all; the library\'s "auto" if not given')
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    if arguments.peers:
        sys.path.append(str(arguments.peers.resolve()))
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    ours = next(row for row in ROWS if row.name == OURS)
    RUNS.mkdir(exist_ok=True)
    result, texts = {"torch": torch.__version__, "python": platform.python_version()}, []
    for network in arguments.network:
        problem = make_problem(network, arguments.epochs, arguments.damping)
        exact = exact_scores(problem, RUNS / "exact")
        rows = []
        for row in ROWS:
            if network not in row.networks or not any(part in row.name for part in arguments.only):
                continue
            if row.package and importlib.util.find_spec(row.package) is None:
                rows.append({"name": row.name, "skipped": f"{row.package} is not installed"})
            else:
                try:
                    rows.append(measure(row, ours, problem, exact))
                except Exception as error:  # a peer that fails shall not cost the table; its row says so
                    rows.append({"name": row.name, "skipped": f"failed, {type(error).__name__}: {error}"[:200]})
            print(rows[-1], file=sys.stderr, flush=True)
        texts.append(table(network, problem, rows, exact))
        result[network] = {"damping": problem.damping, "rows": rows}
        (RUNS / "influence_peers.md").write_text("\n".join(texts))
        (RUNS / "influence_peers.json").write_text(json.dumps(result, indent=1))
        print(texts[-1], flush=True)
