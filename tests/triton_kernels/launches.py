"""Calls of the launchers that between them launch every Triton kernel, in every dtype and every block it may have.

Tensors have no memory (device "meta"): only shapes, strides and dtypes count.
"""

import importlib
import itertools
import random
from functools import partial

import torch

from kdaif_fast.reference.row_terms import (
    CROSS_ENTROPY,
    DECOUPLED,
    JENSEN_SHANNON,
    KINDS,
    KL,
    LOG_COSH,
    LOGIT_MSE,
    LOGITS,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
empty = partial(torch.empty, device="meta")

# [N, T, I], O. For any kernel: one position; several, all candidates; strides that no vector divides; small layers.
LAYERS = (((300, 1, 784), 512), ((4, 256, 768), 768), ((4, 67, 1001), 999), ((4, 7, 16), 48))
# persample_norm takes the other way where there are many positions or few features.
MORE_OF_NORM = (((4, 1024, 64), 64), ((4, 1001, 65), 63))
# One for each width of a block: of layers whose rows vectors divide, and of others.
SIDES = ((16, 32, 64, 128, 4096), (1, 7, 20, 40, 80, 4001))
POWERS = tuple(2**i for i in range(13))


def launches(op, amount):
    """Functions without arguments, each of which launches.

    amount: "few": the sizes that matter most; "quick": every dtype, and all candidates where there are several;
    "thorough": every block that any size leads to, and every option; "random": any sizes.
    """
    module = importlib.import_module(f"kdaif_fast.triton_kernels.{op}")
    of_op = {"row_divergence": of_row_divergence, "row_stats": of_row_stats, "cg_update": of_cg_update}
    yield from of_op.get(op, of_layers)(module, op, amount)


def of_layers(module, op, amount):
    """The ops on a layer's inputs and output gradients."""
    sizes = LAYERS + (MORE_OF_NORM if op == "persample_norm" else ())
    if amount == "few":
        sizes = sizes[1::3]
    if amount == "thorough":
        for N, sides in itertools.product((1, 300), SIDES):
            sizes += tuple(((N, T, features), outputs) for T, features, outputs in itertools.product(sides, repeat=3))
        sizes += tuple(((4, 1, features), outputs) for features, outputs in itertools.product(POWERS, repeat=2))
    if amount == "random":
        sizes = [((any_size(12), any_size(10), any_size(13)), any_size(13)) for _ in range(100)]
    for (shape, outputs), dtype in itertools.product(sizes, DTYPES):
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            yield partial(on_layer, module, op, empty(shape, dtype=dtype), outputs, tf32)
    if amount == "few":
        return
    # Samples so far apart that offsets within a tile need 64 bits.
    far = empty(4 * 2**31, dtype=torch.bfloat16).as_strided((4, 7, 48), (2**31, 48, 1))
    yield partial(on_layer, module, op, far, 33, False)


def on_layer(module, op, a, outputs, tf32):
    """One call of an op of per-sample gradients."""
    N, T, features = a.shape
    b = empty(N, T, outputs, dtype=a.dtype)
    more = {"persample_dot": [empty(2, outputs, features, dtype=a.dtype)], "weighted_grad": [empty(N)]}
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        getattr(module, op)(a, b, *more.get(op, []))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def of_cg_update(module, _op, amount):
    """float32 alone: rows that vectors divide, and others; with and without the best iterate."""
    for P in (17_008,) if amount == "few" else (17_008, 17_003):
        x, r, p, Ap, best = (empty(3, P) for _ in range(5))
        yield partial(module.cg_update, x, r, p, Ap, empty(3), 0.1)
        yield partial(module.cg_update, x, r, p, Ap, empty(3), 0.1, best, empty(3, dtype=torch.bool))
        yield partial(module.cg_dots, p, Ap)


def of_row_stats(module, _op, amount):
    """With and without a teacher, in every width."""
    widths = {"few": [32000], "quick": [100, 1000, 32000], "thorough": [*POWERS, 100, 1000, 32000, 50257]}
    widths["random"] = [any_size(17) for _ in range(100)]
    for V, dtype, has_teacher in itertools.product(widths[amount], DTYPES, (True, False)):
        student, labels = empty(5, V, dtype=dtype), empty(5, dtype=torch.int64)
        yield partial(module.row_stats, student, student if has_teacher else None, labels, 2.0, 0, V, -100)
    if amount == "thorough":
        student = empty(5, 1000)
        for teacher, labels, count in itertools.product((None, student), (None, empty(5, dtype=torch.int64)), (0, 10)):
            yield partial(module.row_stats, student, teacher, labels, 2.0, 0, count, -100)


def any_size(bits):
    """From 1 on, small ones as often as large ones; half of them multiples of 16."""
    size = random.randrange(1, 2 ** random.randint(1, bits))
    return size if random.random() < 0.5 else -(-size // 16) * 16


PLAIN = frozenset()
WEIGHTED = frozenset(("class_weight",))  # the least that is not the common case
EVERYTHING = frozenset(
    ("other", "second", "label_mix", "soft", "exclude", "class_weight", "mask", "rows", "smoothing", "slice")
)


def row_arguments(kind, form, shape, dtype, options, temperature=2.0, ce=0.5):
    """The arguments of row_divergence with these options."""
    N, V = shape
    first, C = (1, V - 2) if "slice" in options and V > 2 else (0, V)
    between_logits = kind in (LOGIT_MSE, LOG_COSH)
    form = LOGITS if between_logits else form
    given = empty(N, C, dtype=dtype) if form == LOGITS else empty(N, C if form == 1 else 5)
    has_second = "second" in options and form != 2 and not between_logits
    mixes = not between_logits and (has_second or "label_mix" in options)
    numbers = [
        temperature,
        ce,
        0.5,
        0.5 * ("other" in options),
        0.2 * mixes,
        1.0,
        0.3,
        0.1 * ("smoothing" in options),
        0.4,
    ]
    return (
        empty(N, V, dtype=dtype),
        given,
        empty(N, 5, dtype=torch.int64) if form == 2 else None,
        given if has_second else None,
        empty(N, dtype=torch.int64),
        empty(N, V) if "soft" in options else None,
        empty(V) if "class_weight" in options else None,
        empty(N, C, dtype=torch.bool) if "mask" in options else None,
        empty(N) if "weight" in options else None,
        empty(7, N) if "rows" in options else None,
        numbers,
        [kind, form, int(mixes), int("exclude" in options), first, C, -100],
    )


def of_row_divergence(module, _op, amount):
    """Values with gradients, and products with one tangent and with four."""
    cases = {"few": [few_cases], "quick": [main_cases, kind_cases], "thorough": [main_cases, kind_cases, all_cases]}
    cases["random"] = [random_cases]
    for args, counts, gauss_newton in itertools.chain.from_iterable(case() for case in cases[amount]):
        yield partial(module.row_divergence_with_grad, *args)
        for count in counts:
            tangents = empty(count, *args[0].shape, dtype=args[0].dtype)
            yield partial(module.row_divergence_hvp, tangents, gauss_newton, *args)


def few_cases():
    """The common case on narrow and wide rows; most options at once."""
    for V in (1000, 32000):
        yield row_arguments(KL, LOGITS, (2, V), torch.bfloat16, PLAIN), (4,), False
    yield row_arguments(DECOUPLED, 2, (2, 32000), torch.float32, EVERYTHING), (1,), True


def main_cases():
    """Cross-entropy and forward KL in every dtype, on narrow and wide rows; and what has a size of 1."""
    for dtype, V in itertools.product(DTYPES, (1000, 32000)):
        yield row_arguments(KL, LOGITS, (2, V), dtype, PLAIN), (1,) if V == 1000 else (4,), False
        if V == 1000:
            yield row_arguments(KL, LOGITS, (2, 1024), dtype, WEIGHTED), (), False
        else:
            yield row_arguments(KL, LOGITS, (2, V), dtype, PLAIN, 3.0), (), False
    yield row_arguments(KL, LOGITS, (1, 1), torch.float32, PLAIN), (1,), False
    yield row_arguments(DECOUPLED, 2, (1, 1), torch.bfloat16, EVERYTHING), (3,), False
    yield row_arguments(KL, LOGITS, (2, 50257), torch.bfloat16, PLAIN), (2,), False


def kind_cases():
    """Every kind, and every option."""
    for kind in set(KINDS) - {KL}:
        yield row_arguments(kind, LOGITS, (2, 4096), torch.float32, PLAIN), (1,), False
    for kind, form in ((KL, 0), (JENSEN_SHANNON, 1), (DECOUPLED, 2)):
        yield row_arguments(kind, form, (2, 32000), torch.float32, EVERYTHING), (1,), True


def all_cases():
    """Every block; and the product of kinds, forms, a few sets of options and both sorts of width."""
    for V, dtype in itertools.product((20, 40, 80, 160, 320, 640, 2048, 4096, 32000), DTYPES):
        yield row_arguments(KL, LOGITS, (2, V), dtype, PLAIN), (1, 2, 4), False
        yield row_arguments(KL, LOGITS, (2, V), dtype, WEIGHTED), (), False
        for kind, temperature, ce in ((KL, 1.0, 0.5), (KL, 3.0, 0.5), (KL, 3.0, 0.0), (CROSS_ENTROPY, 4.0, 0.5)):
            yield row_arguments(kind, LOGITS, (2, V), dtype, PLAIN, temperature, ce), (), False
    options = (EVERYTHING, PLAIN, frozenset(("other", "rows", "mask")))
    for chosen, V, kind, form in itertools.product(options, (32000, 4096), KINDS, range(3)):
        if form == LOGITS or kind not in (LOGIT_MSE, LOG_COSH):
            yield row_arguments(kind, form, (2, V), torch.float32, chosen), (1, 4), V == 4096
            if kind in (KL, JENSEN_SHANNON, DECOUPLED):
                yield row_arguments(kind, form, (2, V), torch.bfloat16, chosen), (2,), V == 4096


def random_cases():
    """The common case on rows of any width."""
    for dtype in DTYPES * 60:
        yield row_arguments(KL, LOGITS, (2, any_size(17)), dtype, PLAIN), (random.randint(1, 9),), False
