"""`kdaif-fast distill`: a distillation as a TOML file describes it."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..._config import ConfigError
from ..._files import replaced
from ..modes import unwrapped
from ..runs.report import report
from ..runs.run_folder import CHECKPOINT
from .assembly import Assembled, assemble
from .reading import Config, read_config

SETTINGS, STUDENT = "run.json", "student.safetensors"
OWN_FILES = (
    *(SETTINGS, STUDENT, CHECKPOINT, "log.jsonl", "log.csv", "samples.safetensors", "samples.json", "report.html"),
    "tensorboard",
)
"""What a run leaves in its folder, and starting over removes."""

MAY_CHANGE = (
    *("run.dir", "run.epochs", "run.checkpoint_every", "run.tensorboard", "run.threads", "run.device"),
    "data.workers",
)
"""Settings that a run may go on with changed: they do not say what is learned."""


def distill_from_config(
    path: Path,
    *,
    changes: Sequence[str] = (),
    out: Path | None = None,
    resume: bool = True,
    check: bool = False,
    progress: bool | None = None,
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Read the file, check everything that it names, train, and write log, checkpoint, student and report.

    Nothing is written before everything is checked: keys, types, files, functions, packages, data, networks; a few
    samples go through all of it. The random states of torch, NumPy and Python are set by run.seed.

    Args:
        path: a TOML file, see config.EXAMPLE.
        changes: "section.key=value", in place of what the file has.
        out: the run's folder, in place of run.dir.
        resume: whether to go on with what a run before has left there; False starts over, and removes it.
        check: only check.
        progress: show a progress bar; None shows it on a terminal only.
        say: where the summary goes, line by line.

    Returns:
        One record an epoch, as Distiller.fit; none if only checked.

    Raises:
        ConfigError: something that cannot be used, or a folder with a run of other settings; the message names the key.
        LossNotFiniteError: in training; what was saved before is intact.
    """
    config = read_config(path, changes, out)
    with _threads(config.run.threads):
        run = assemble(config, progress)
        if resume:
            _require_same_run(config)
        if check:
            say(f"{path} can be run: {_described(config, run)}")
            return []
        if not resume:
            _remove(config.run.folder)
        config.run.folder.mkdir(parents=True, exist_ok=True)
        _write_settings(config)
        say(_described(config, run))
        records = _train(config, run, resume)
        student = config.run.folder / STUDENT
        _write_student(student, unwrapped(run.distiller.student))
        for line in _summary(records):
            say(line)
        say(f"student: {student}")
        say(f"report: {report(config.run.folder)}")
    return records


def _train(config: Config, run: Assembled, resume: bool) -> list[dict[str, Any]]:
    distiller, options = run.distiller, config.run
    with warnings.catch_warnings():
        # Starting a finished run again is how one gets its summary and report.
        warnings.filterwarnings("ignore", message=".*nothing left to train")
        if options.teacher_epochs:
            distiller.fit_teacher(run.train, options.teacher_epochs, resume=resume)
        return distiller.fit(run.train, run.data.validation, options.epochs, run.data.test, resume=resume)


def _described(config: Config, run: Assembled) -> str:
    """What is trained on what, in a line."""
    parts = {"training": run.data.train, "validation": run.data.validation, "test": run.data.test}
    counts = [f"{len(data.dataset)} {name}" for name, data in parts.items() if hasattr(data, "dataset")]
    samples = f"{', '.join(counts)} samples; " if counts else ""
    models = (("teacher", run.distiller.teacher), ("student", run.distiller.student))
    sizes = [f"{name} of {sum(p.numel() for p in model.parameters()):,} parameters" for name, model in models]
    return f"{samples}{', '.join(sizes)}; mechanism {config.mechanism}, in {config.run.folder}"


def _summary(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What came out, in a few lines."""
    if not records:
        return
    last = records[-1]
    for who in ("student", "teacher"):
        told = [
            f"{100 * accuracy:.1f} % on {where}"
            for where, accuracy in (
                ("validation", last.get(f"{who}_accuracy")),
                ("test", last.get(f"test_{who}_accuracy")),
            )
            if accuracy is not None
        ]
        if told:
            yield f"{who}: {', '.join(told)} data, after {last['epoch']} epochs"
    if "mean_weight" in last:
        yield f"weights: mean {last['mean_weight']:.3f}, {100 * last['share_below_1']:.1f} % below 1"
    if "flip_auc" in last:
        yield (
            f"flipped labels: {100 * last['flipped_below_1']:.1f} % below 1, of the others "
            f"{100 * last['clean_below_1']:.1f} %; AUC {last['flip_auc']:.3f}"
        )


def _require_same_run(config: Config) -> None:
    """ConfigError if the folder has a run of other settings, which it would be wrong to go on with."""
    folder = config.run.folder
    settings = folder / SETTINGS
    advice = "Take another run.dir, or start over with --restart, which removes it"
    if not settings.exists():
        if (folder / CHECKPOINT).exists():
            raise ConfigError(
                f"{config.path}: run.dir is {str(folder)!r}, which has a run without {SETTINGS}. {advice}"
            )
        return
    try:
        before = _flat(json.loads(settings.read_text())["settings"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{config.path}: {settings} cannot be read: {error}. {advice}") from error
    now = _flat(_plain(config.resolved))
    differ = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key) and key not in MAY_CHANGE]
    if differ:
        told = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in differ[:5])
        raise ConfigError(
            f"{config.path}: run.dir is {str(folder)!r}, which has a run of other settings: {told}. {advice}"
        )


def _write_settings(config: Config) -> None:
    told = {"config": config.path.name, "settings": _plain(config.resolved)}
    with replaced(config.run.folder / SETTINGS) as part:
        part.write_text(json.dumps(told, indent=2) + "\n")


def _write_student(file: Path, student: torch.nn.Module) -> None:
    """The student's state dict, as `checkpoint` of a config, or safetensors' load_file, takes it."""
    from safetensors.torch import save_file

    # Copies: tied parameters would share memory, which the format does not have.
    state = {name: value.detach().cpu().clone().contiguous() for name, value in student.state_dict().items()}
    with replaced(file) as part:
        save_file(state, part)


def _remove(folder: Path) -> None:
    """What a run before has left; nothing else."""
    for name in OWN_FILES:
        place = folder / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """As JSON has it, without what is None."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """By full keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Within it torch has so many threads."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
