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

# [N, T, I], O. All candidates without masks; sizes that blocks do not divide, or not all; strides that no vector
# divides. persample_norm takes the other way where there are many positions.
LAYERS = {
    "persample_dot": (((128, 512, 768), 1024), ((128, 512, 784), 1000), ((300, 7, 1001), 999)),
    "persample_grad": (((32, 64, 768), 768), ((32, 197, 784), 1000), ((4, 67, 1001), 999)),
    "persample_norm": (((4, 512, 768), 1024), ((4, 1024, 256), 512), ((4, 197, 784), 1000), ((4, 101, 1001), 999)),
    "weighted_grad": (((64, 512, 768), 2048), ((64, 197, 784), 2000), ((4, 67, 1001), 999)),
}
ONE_POSITION = ((300, 1, 784), 512)
SMALL = (((4, 7, 16), 48), ((4, 7, 10), 3), ((4, 5, 65), 63), ((4, 1001, 65), 63))
# One for each width of a block: of layers whose rows vectors divide, and of others.
SIDES = ((16, 32, 64, 128, 4096), (1, 7, 20, 40, 80, 4001))
POWERS = tuple(2**i for i in range(13))


def launches(op, amount):
    """Functions without arguments, each of which launches.

    amount: "few": each kernel, dtype and candidate; "quick": with masks and more options, too;
    "thorough": every block that any size leads to, and every option; "random": any sizes.
    """
    module = importlib.import_module(f"kdaif_fast.triton_kernels.{op}")
    of_op = {
        "row_divergence": of_row_divergence,
        "row_stats": of_row_stats,
        "cg_update": of_cg_update,
        "persample_layer_norm": of_layer_norm,
        "persample_group_norm": of_group_norm,
        "persample_inner": of_inner,
    }
    yield from of_op.get(op, of_layers)(module, op, amount)


def of_layers(module, op, amount):
    """The ops on a layer's inputs and output gradients."""
    sizes = LAYERS[op]
    if amount == "thorough":
        sizes += (ONE_POSITION, *SMALL)
        for N, sides in itertools.product((1, 300), SIDES):
            sizes += tuple(((N, T, features), outputs) for T, features, outputs in itertools.product(sides, repeat=3))
        sizes += tuple(((4, 1, features), outputs) for features, outputs in itertools.product(POWERS, repeat=2))
    if amount == "random":
        sizes = [((any_size(12), any_size(10), any_size(13)), any_size(13)) for _ in range(100)]
    everything = list(itertools.product(sizes, DTYPES, (False, True)))
    if amount in ("few", "quick"):
        whole, odd = sizes[: 2 if op == "persample_norm" else 1], sizes[-1]
        # Masks cost bfloat16 most, whose tiles are the largest; odd strides make all tiles small.
        masked = [(size, torch.bfloat16, False) for size in sizes if size not in whole]
        everything = [case for case in everything if case[0] in whole]
        everything += [*masked, (odd, torch.float32, False)] if amount == "quick" else []
        if amount == "quick" and op in ("persample_grad", "persample_norm"):
            everything += [(ONE_POSITION, dtype, False) for dtype in DTYPES]
    for (shape, outputs), dtype, tf32 in everything:
        if dtype == torch.float32 or not tf32:
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


# A side of a tile: those that vectors divide, and others.
ANY_SIDE = (*POWERS, *(2**i - 1 for i in range(2, 13)))


def two_axes(shape, dtype):
    """A tensor [N, C, L], and one with channels side by side."""
    x = empty(shape, dtype=dtype)
    return x, empty(shape[0], shape[2], shape[1], dtype=dtype).mT


def sizes_of_sums(amount, few):
    """(N, axis, axis), dtype: these for "few"; with a type for each for "quick"; any."""
    if amount in ("few", "quick"):
        for i, dtype in enumerate((torch.bfloat16, torch.float32, torch.float16)):
            yield from ((shape, dtype) for shape in few[: None if i == 0 and amount == "quick" else 2 - i])
        return
    sides = itertools.product(ANY_SIDE, repeat=2)
    if amount == "random":
        sides = [(any_size(13), any_size(13)) for _ in range(100)]
    for (first, second), dtype in itertools.product(sides, DTYPES):
        yield (8, first, second), dtype


def of_layer_norm(module, _op, amount):
    """Vectors of 16 bytes, of a few elements, none; one position; parts; RMS norms."""
    for shape, dtype in sizes_of_sums(amount, ((8, 512, 768), (4, 70, 1001), (300, 1, 512), (2, 9000, 20))):
        x, statistic = empty(shape, dtype=dtype), empty(shape[:2])
        yield partial(module.persample_layer_norm, x, x, statistic, statistic)
    yield partial(module.persample_layer_norm, x, x, None, statistic)


def of_group_norm(module, _op, amount):
    """Both memory formats, and a tensor of each."""
    shapes = ((8, 64, 3136), (8, 512, 49), (8, 256, 196), (1, 8, 50_000))
    for shape, dtype in sizes_of_sums(amount, shapes):
        x, last = two_axes(shape, dtype)
        statistic = empty(shape[0], max(shape[1] // 2, 1))
        yield partial(module.persample_group_norm, x, x, statistic, statistic)
        yield partial(module.persample_group_norm, last, last, statistic, statistic)
    yield partial(module.persample_group_norm, x, last, statistic, statistic)


def of_inner(module, _op, amount):
    """Both memory formats, and a tensor of each."""
    for shape, dtype in sizes_of_sums(amount, ((8, 64, 3136), (8, 33, 49), (8, 256, 196), (300, 10, 1))):
        x, last = two_axes(shape, dtype)
        yield partial(module.persample_inner, x[:, None], x)
        yield partial(module.persample_inner, last[:, None], x)
        yield partial(module.persample_inner, x[:, None], last)


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
        if amount == "quick" and max(widths["quick"]) > V and dtype != torch.bfloat16:
            continue
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
    cases = {"few": [few_cases], "quick": [main_cases, option_cases]}
    cases["thorough"] = [main_cases, option_cases, kind_cases, all_cases]
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
    """Cross-entropy and forward KL in every dtype on wide rows, and on narrow ones; and what has a size of 1."""
    for dtype in DTYPES:
        yield row_arguments(KL, LOGITS, (2, 32000), dtype, PLAIN), (4,), False
    yield row_arguments(KL, LOGITS, (2, 32000), torch.bfloat16, PLAIN, 3.0), (), False
    yield row_arguments(KL, LOGITS, (2, 1000), torch.bfloat16, PLAIN), (1,), False
    yield row_arguments(KL, LOGITS, (2, 1024), torch.bfloat16, WEIGHTED), (), False
    yield row_arguments(KL, LOGITS, (1, 1), torch.float32, PLAIN), (1,), False
    yield row_arguments(DECOUPLED, 2, (1, 1), torch.bfloat16, EVERYTHING), (3,), False
    yield row_arguments(KL, LOGITS, (2, 50257), torch.bfloat16, PLAIN), (2,), False


def kind_cases():
    """Every kind, and narrow rows in every dtype."""
    for kind in set(KINDS) - {KL}:
        yield row_arguments(kind, LOGITS, (2, 4096), torch.float32, PLAIN), (1,), False
    for dtype in DTYPES:
        yield row_arguments(KL, LOGITS, (2, 1000), dtype, PLAIN), (1,), False
    yield row_arguments(JENSEN_SHANNON, 1, (2, 32000), torch.float32, EVERYTHING), (1,), True


def option_cases():
    """Every option."""
    for kind, form in ((KL, 0), (DECOUPLED, 2)):
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
