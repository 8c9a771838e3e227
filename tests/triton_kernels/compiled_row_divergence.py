"""Compiles row_divergence's Triton kernels for a GPU that is not here: run by test_row_divergence.py on its own.

    python compiled_row_divergence.py COMPUTE_CAPABILITY main|kinds|all

It goes through the launchers, with a driver that compiles and does not launch, and says what it compiled.
"""

import itertools
import sys

import torch

from kdaif_fast.reference.row_terms import DECOUPLED, JENSEN_SHANNON, KINDS, KL, LOG_COSH, LOGIT_MSE, LOGITS

FORMS = range(3)
PLAIN = frozenset()
EVERYTHING = frozenset(
    ("other", "second", "label_mix", "soft", "exclude", "class_weight", "mask", "rows", "smoothing", "slice")
)


class _Driver:
    """What the compiler asks of a driver."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class _Compiled:
    """In place of a tuned kernel: compiles all of its configurations for the arguments of a launch."""

    def __init__(self, tuner, name):
        self.tuner, self.name = tuner, name

    def __getitem__(self, grid):
        return self.launch

    def launch(self, **arguments):
        for configuration in self.tuner.configs:
            wanted = configuration.all_kwargs()
            kernel = self.tuner.fn.warmup(grid=(1,), **arguments, **wanted)
            assert kernel.metadata.shared <= 48 * 1024
            loads = kernel.asm["ttir"].count("tt.load")
            print(f"COMPILED {self.name} loads={loads} {wanted}", file=sys.stderr, flush=True)


def arguments(kind, form, shape, dtype, options):
    """The arguments of an op that has these options."""
    N, V = shape
    first, C = (1, V - 2) if "slice" in options and V > 2 else (0, V)
    between_logits = kind in (LOGIT_MSE, LOG_COSH)
    form = LOGITS if between_logits else form
    given = torch.zeros(N, C, dtype=dtype) if form == LOGITS else torch.zeros(N, C if form == 1 else 5)
    has_second = "second" in options and form != 2 and not between_logits
    mixes = not between_logits and (has_second or "label_mix" in options)
    numbers = [2.0, 0.5, 0.5, 0.5 * ("other" in options), 0.2 * mixes, 1.0, 0.3, 0.1 * ("smoothing" in options), 0.4]
    return (
        torch.zeros(N, V, dtype=dtype),
        given,
        torch.zeros(N, 5, dtype=torch.int64) if form == 2 else None,
        given if has_second else None,
        torch.zeros(N, dtype=torch.int64),
        torch.zeros(N, V) if "soft" in options else None,
        torch.zeros(V) if "class_weight" in options else None,
        torch.zeros(N, C, dtype=torch.bool) if "mask" in options else None,
        torch.zeros(N) if "weight" in options else None,
        torch.zeros(7, N) if "rows" in options else None,
        numbers,
        [kind, form, int(mixes), int("exclude" in options), first, C, -100],
    )


def compile_all(module, args, tangent_counts, gauss_newton):
    """Values with gradients, and curvature products."""
    module.row_divergence_with_grad(*args)
    for count in tangent_counts:
        tangents = torch.zeros(count, *args[0].shape, dtype=args[0].dtype)
        module.row_divergence_hvp(tangents, gauss_newton, *args)


def main_cases():
    """Cross-entropy and forward KL in every dtype and width; and what has a size of 1."""
    for dtype, V in itertools.product((torch.float32, torch.bfloat16, torch.float16), (1000, 32000)):
        yield arguments(KL, LOGITS, (2, V), dtype, PLAIN), (1,) if V == 1000 else (4,), False
    yield arguments(KL, LOGITS, (1, 1), torch.float32, PLAIN), (1,), False
    yield arguments(DECOUPLED, 2, (1, 1), torch.bfloat16, EVERYTHING), (3,), False
    yield arguments(KL, LOGITS, (2, 50257), torch.bfloat16, PLAIN), (2,), False


def kind_cases():
    """Every kind, and every option."""
    for kind in set(KINDS) - {KL}:
        yield arguments(kind, LOGITS, (2, 4096), torch.float32, PLAIN), (1,), False
    for kind, form in ((KL, 0), (JENSEN_SHANNON, 1), (DECOUPLED, 2)):
        yield arguments(kind, form, (2, 32000), torch.float32, EVERYTHING), (1,), True


def all_cases():
    """The cross product of kinds, forms, a few sets of options and both sorts of width; the narrow types for some."""
    options = (EVERYTHING, PLAIN, frozenset(("other", "rows", "mask")))
    for chosen, V, kind, form in itertools.product(options, (32000, 4096), KINDS, FORMS):
        if form == LOGITS or kind not in (LOGIT_MSE, LOG_COSH):
            yield arguments(kind, form, (2, V), torch.float32, chosen), (1, 4), V == 4096
            if kind in (KL, JENSEN_SHANNON, DECOUPLED):
                yield arguments(kind, form, (2, V), torch.bfloat16, chosen), (2,), V == 4096


def run(capability, cases):
    """Compile for a GPU of this compute capability."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from kdaif_fast.triton_kernels import row_divergence as module

    driver.set_active(_Driver(GPUTarget("cuda", capability, 32)))
    tuned = module._tuned
    module._tuned = lambda kernel, *key: _Compiled(tuned(kernel, *key), kernel.__name__)
    for args, tangent_counts, gauss_newton in cases():
        print(f"CASE {args[-1]} {tuple(args[0].shape)} {args[0].dtype}", file=sys.stderr, flush=True)
        compile_all(module, args, tangent_counts, gauss_newton)


if __name__ == "__main__":
    run(int(sys.argv[1]), {"main": main_cases, "kinds": kind_cases, "all": all_cases}[sys.argv[2]])
