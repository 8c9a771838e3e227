"""Semi-supervised distillation of digits: 100 labels, 900 images without, five seeds a row.

    python benchmarks/experiments/semi_supervised.py

writes docs/results_semi_supervised.md. Figures of runs that are done are kept (--keep FILE) and not run again.

All rows have the same splits, networks, optimizers and number of steps; nothing was tuned on the test images.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from kdaif_fast.distill import Distiller, SemiSupervisedDistiller
from kdaif_fast.distill.runs.weight_figures import chance_of_less

LABELLED, UNLABELLED, VALIDATION = 100, 900, 200
ROUNDS, EPOCHS, TEACHER_EPOCHS = 4, 10, 30
BATCH, LABELLED_BATCH, RATE = 64, 20, 2e-3
TABLE = Path(__file__).parents[2] / "docs" / "results_semi_supervised.md"
PLAIN = "plain pseudo-labels, hard"
OWN = "influence M3, hard, on the labelled images themselves"

HARD = {"pseudo_labels": "hard"}
ROWS = {
    "the 100 labels only": "labels",
    "plain pseudo-labels, soft, fixed teacher": {"feedback": "none", "mechanism": "vanilla"},
    "plain pseudo-labels, soft": {"feedback": "none"},
    PLAIN: {"feedback": "none", **HARD},
    "meta, hard": {"feedback": "meta", **HARD},
    "meta, hard, rate 1": {"feedback": "meta", "feedback_rate": 1.0, **HARD},
    "influence M3, soft": {"mechanism": "M3"},
    "influence M1, hard": {"mechanism": "M1", **HARD},
    "influence M2, hard": {"mechanism": "M2", **HARD},
    "influence M3, hard": {"mechanism": "M3", **HARD},
    OWN: {"mechanism": "M3", **HARD},
    "plain pseudo-labels, hard, validation images as labelled ones": "validation",
    "all 1,000 labels": "all",
}


def digits(seed):
    """Labelled, unlabelled (with the labels that nobody sees), validation and test images of a random split."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.tensor(pixels[order] / 16, dtype=torch.float32)
    y = torch.tensor(labels[order], dtype=torch.int64)
    sizes = [LABELLED, UNLABELLED, VALIDATION, len(y) - LABELLED - UNLABELLED - VALIDATION]
    return [TensorDataset(*part) for part in zip(x.split(sizes), y.split(sizes), strict=True)]


def mlp(*widths):
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def adam(parameters):
    return torch.optim.Adam(parameters, RATE)


def run(name, seed):
    """One seed of a row: accuracies on the test images, and how wrong pseudo-labels stand to weights."""
    row = ROWS[name]
    labelled, unlabelled, validation, test = digits(seed)
    torch.manual_seed(seed)
    networks = mlp(64, 128, 128, 10), mlp(64, 32, 10), adam, adam
    validation_batch, test_batch = [(labelled if name == OWN else validation)[:]], [test[:]]
    start = time.perf_counter()
    if row in ("labels", "all"):
        steps = ROUNDS * EPOCHS * -(-(LABELLED + UNLABELLED) // BATCH)
        data, batch = (labelled, LABELLED_BATCH) if row == "labels" else (ConcatDataset([labelled, unlabelled]), BATCH)
        train = DataLoader(data, batch, shuffle=True)
        distiller = Distiller(*networks, mechanism="online", progress=False)
        history = distiller.fit(train, validation_batch, steps // len(train), test_loader=test_batch)
        wrong = None
    else:
        settings = ROWS[PLAIN] if row == "validation" else row
        known = ConcatDataset([labelled, validation]) if row == "validation" else labelled
        distiller = SemiSupervisedDistiller(*networks, progress=False, **settings)
        history = distiller.fit(
            DataLoader(known, LABELLED_BATCH, shuffle=True),
            DataLoader(TensorDataset(unlabelled.tensors[0]), BATCH),
            # Training on them, too: there is no influence in this row, and accuracy on them is not looked at.
            None if row == "validation" else validation_batch,
            ROUNDS,
            EPOCHS,
            TEACHER_EPOCHS,
            test_loader=test_batch,
        )
        targets = distiller.pseudo.targets
        wrong = (targets.argmax(1) if targets.dim() == 2 else targets) != unlabelled.tensors[1]
    figures = {
        "student": history[-1]["test_student_accuracy"],
        "teacher": history[-1]["test_teacher_accuracy"],
        "seconds": time.perf_counter() - start,
    }
    if wrong is not None:
        figures["wrong"] = float(wrong.double().mean())
        weights = distiller.weights_unlabelled
        if weights is not None:
            figures["auc"] = chance_of_less(weights[wrong], weights[~wrong])
    return figures


def spread(values, form="{:.1f} ± {:.1f}", scale=100.0):
    values = [scale * value for value in values]
    return form.format(np.mean(values), np.std(values, ddof=1)) if len(values) > 1 else f"{values[0]:.1f}"


def table(found):
    """The rows in Markdown: means and standard deviations over the seeds."""
    lines = [
        "| | student, % | teacher, % | student, difference to plain hard | teacher, likewise | wrong pseudo-labels, % "
        "| AUC of their weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seeds in found.items():
        cells = [name, spread([f["student"] for f in seeds.values()]), spread([f["teacher"] for f in seeds.values()])]
        for network in ("student", "teacher"):
            gains = [seeds[seed][network] - found[PLAIN][seed][network] for seed in seeds]
            cells.append("" if name == PLAIN else spread(gains, "{:+.1f} ± {:.1f}"))
        for key, scale, form in (("wrong", 100.0, "{:.1f} ± {:.1f}"), ("auc", 1.0, "{:.2f} ± {:.2f}")):
            values = [f[key] for f in seeds.values() if key in f]
            cells.append(spread(values, form, scale) if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(found, seeds):
    return f"""# Semi-supervised distillation, measured

scikit-learn's digits: {LABELLED} labelled images, {UNLABELLED} without labels, {VALIDATION} labelled ones for
validation, the other 597 to test on. Teacher 64-128-128-10, student 64-32-10, Adam with learning rate {RATE:g}. The
teacher learns from the labelled images for {TEACHER_EPOCHS} epochs; then {ROUNDS} rounds of {EPOCHS} epochs. All other
settings are the defaults. {seeds} seeds: other splits and other parameters. Mean ± standard deviation over the seeds;
differences are taken seed by seed. `python benchmarks/experiments/semi_supervised.py` makes this page.

{table(found)}

Without "fixed teacher" the teacher goes on learning, from labels and pseudo-labels. "Wrong" are pseudo-labels of the
last round; the AUC is the chance that a wrong one has a lower weight at the end than a right one. A difference that
is not well beyond its standard deviation is no help.

Influence sees {VALIDATION} labels that the plain rows and "meta" do not. The row with the validation images as labelled
ones shows what these are worth when they are simply trained on, and "on the labelled images themselves" what influence
is worth without them: there it is on the loss of the {LABELLED} images that are trained on, too.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="a JSON file for the figures of runs that are done")
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = json.loads(options.keep.read_text()) if options.keep and options.keep.exists() else {}
    for seed in map(str, range(options.seeds)):
        for name in ROWS:
            if seed in done.setdefault(name, {}):
                continue
            done[name][seed] = run(name, int(seed))
            print(f"seed {seed}: {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in done[name][seed].items()), flush=True)
            if options.keep:
                options.keep.write_text(json.dumps(done, indent=1))
    chosen = {name: {str(seed): done[name][str(seed)] for seed in range(options.seeds)} for name in ROWS}
    options.out.write_text(page(chosen, options.seeds))
    print(table(chosen))


if __name__ == "__main__":
    main()
