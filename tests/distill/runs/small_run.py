"""A run's folder made by a real, small training on digits with wrong labels."""

from types import SimpleNamespace

import torch
from torch.nn.functional import cross_entropy

from kdaif_fast import influence_scores, sigmoid_weights
from kdaif_fast.demo.data import load_digits
from kdaif_fast.demo.training import accuracy, build
from kdaif_fast.distill.runs.run_log import RunLog
from kdaif_fast.distill.runs.samples_file import SampleFacts, write_contents, write_samples
from kdaif_fast.distill.runs.weight_figures import weight_figures


def train(folder, epochs=3, flip=0.2, warmup=1):
    """Train a network on its own, weighted by influence; returns what the report should know."""
    data = load_digits(flip, seed=0)
    N = len(data.train_y)
    facts = SampleFacts(
        true_labels=data.true_y,
        groups=["left" if x[:32].sum() > x[32:].sum() else "right" for x in data.train_x],
        class_names=[f"digit {label}" for label in range(10)],
        image_shape=(8, 8),
    )
    teacher, student = build(64), build(32)
    optimizer = torch.optim.Adam([*teacher.parameters(), *student.parameters()], 2e-3)
    phi, weights = torch.zeros(N), torch.ones(N)
    log = RunLog(folder)
    step = 0
    for epoch in range(1, epochs + 1):
        if epoch > warmup:
            phi, solution = influence_scores(
                student, (data.train_x, data.train_y), (data.val_x, data.val_y),
                damping=0.01, tol=None, max_iter=5, return_solution=True,
            )  # fmt: skip
            fresh = sigmoid_weights(phi)
            weights = fresh if epoch == warmup + 1 else weights.lerp(fresh, 0.5)
            log.write(
                {"kind": "refresh", "epoch": epoch, "step": step, "residual": solution.residual,
                 "iterations": solution.iterations, "damping": solution.damping, "seconds": 0.02,
                 "phi_low": phi.min(), "phi_high": phi.max()}
            )  # fmt: skip
        losses = SimpleNamespace(student=0.0, teacher=0.0)
        for index in torch.randperm(N).split(64):
            x, y = data.train_x[index], data.train_y[index]
            of_teacher = cross_entropy(teacher(x), y)
            of_student = (weights[index] * cross_entropy(student(x), y, reduction="none")).mean()
            optimizer.zero_grad()
            (of_teacher + of_student).backward()
            optimizer.step()
            step += 1
            losses.student += of_student.item() * len(index) / N
            losses.teacher += of_teacher.item() * len(index) / N
        log.write(
            {"kind": "epoch", "epoch": epoch, "step": step,
             "student_loss": losses.student, "teacher_loss": losses.teacher,
             "student_accuracy": accuracy(student, data.val_x, data.val_y),
             "teacher_accuracy": accuracy(teacher, data.val_x, data.val_y),
             "test_student_accuracy": accuracy(student, data.test_x, data.test_y),
             "test_teacher_accuracy": accuracy(teacher, data.test_x, data.test_y),
             **weight_figures(weights, data.flipped),
             "seconds": {"data": 0.05, "teacher": 0.2, "student": 0.25,
                         "influence": 0.1 if epoch > warmup else 0.0, "evaluation": 0.03}}
        )  # fmt: skip
        write_samples(folder, weights, phi, data.train_y, facts)
    log.close()
    write_contents(folder, [(x, int(y)) for x, y in zip(data.train_x, data.train_y, strict=True)], facts)
    return SimpleNamespace(data=data, weights=weights, phi=phi, facts=facts, steps=step)
