"""Peak memory of per-sample quantities, against a plain training step.

`python benchmarks/persample_memory.py conv dots` prints one peak, in MiB above what the model and its batch need;
`python benchmarks/persample_memory.py` all of them, each from a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from peak_memory import peak_mib, run_in_a_process
from persample_models import MODELS, Problem, make, plain_step

from kdaif_fast import sigmoid_weights
from kdaif_fast.per_sample import per_sample_grad_dots, per_sample_grad_norms, per_sample_grads, weighted_step

QUANTITIES = ("plain step", "dots", "norms", "weighted step", "gradients", "gradients, buffers given")


def prepared(problem: Problem, quantity: str) -> Callable[[], object]:
    """A call without arguments; directions and buffers are made here, outside of what is measured."""
    model, batch = problem
    named = dict(model.named_parameters())
    direction = {name: torch.randn_like(p) for name, p in named.items()}
    if quantity == "plain step":
        return lambda: plain_step(problem)
    if quantity == "dots":
        return lambda: per_sample_grad_dots(model, batch, direction)
    if quantity == "norms":
        return lambda: per_sample_grad_norms(model, batch)
    if quantity == "weighted step":
        return lambda: weighted_step(model, batch, weight_fn=sigmoid_weights, direction=direction)
    if quantity == "gradients":
        return lambda: per_sample_grads(model, batch)
    if quantity == "gradients, buffers given":
        buffers = {name: p.new_ones(len(batch[0]), *p.shape) for name, p in named.items()}
        return lambda: per_sample_grads(model, batch, out=buffers)
    raise ValueError(f"quantity is {quantity!r}, expected one of {QUANTITIES}")


def peak(model_name: str, quantity: str) -> float:
    """MiB above model, batch, direction and buffers, with no `.grad` at the start; one thread."""
    torch.set_num_threads(1)
    problem = make(model_name)
    call = prepared(problem, quantity)

    def warm_up() -> None:
        call()
        problem.model.zero_grad(set_to_none=True)

    return peak_mib(call, warm_up)


def peak_of_a_process(model_name: str, quantity: str) -> float:
    """The same, in a process of its own."""
    return run_in_a_process(__file__, model_name, quantity)


def gradient_mib(model_name: str) -> float:
    """The size of all samples' gradients."""
    problem = make(model_name, 1)
    return MODELS[model_name][2] * sum(p.numel() * p.element_size() for p in problem.model.parameters()) / 2**20


def main(arguments: list[str]) -> None:
    """One peak, or the table."""
    if arguments:
        print(peak(*arguments))
        return
    print("| model | " + " | ".join(QUANTITIES) + " | all gradients |")
    print("|---|" + "---:|" * (len(QUANTITIES) + 1))
    for model_name in MODELS:
        peaks = [peak_of_a_process(model_name, quantity) for quantity in QUANTITIES]
        print(f"| {model_name} | " + " | ".join(f"{x:.1f}" for x in [*peaks, gradient_mib(model_name)]) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
