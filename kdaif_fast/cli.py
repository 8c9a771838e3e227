"""The command line: `kdaif-fast`."""

from __future__ import annotations

from pathlib import Path

import click

from . import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="kdaif-fast")
def main() -> None:
    """Influence of training samples, fast enough to be used inside training."""


@main.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=8, show_default=True, help="Repetitions.")
@click.option(
    "--flip", type=click.FloatRange(0, 0.9), default=0.2, show_default=True, help="Share of training labels made wrong."
)
@click.option("--quiet", is_flag=True, help="No progress bar (there is none anyway where output is no terminal).")
def demo(out: Path, seeds: int, flip: float, quiet: bool) -> None:
    """Distil on real digits with wrong labels, with and without influence weights, and compare."""
    from .demo import run_demo

    try:
        run_demo(out, seeds, flip, progress=False if quiet else None, say=click.echo)
    except ImportError as error:
        raise click.ClickException(str(error)) from error


def _example() -> str:
    """The last part of the help, in lines that click leaves as they are."""
    from .influence.config import EXAMPLE

    return "An example of the file:\n\n\b\n" + "\n".join(line or " " for line in EXAMPLE.splitlines())


@main.command(epilog=_example())
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="A TOML file that says what to score.",
)
@click.option("--restart", is_flag=True, help="Start over, instead of going on with what a run before has written.")
@click.option("--quiet", is_flag=True, help="No progress bars (there are none anyway where output is no terminal).")
def scores(config: Path, restart: bool, quiet: bool) -> None:
    """Write the influence of every training sample to a file, and tell the most harmful and most helpful ones.

    phi > 0 means that the sample harms the validation loss. A run that was killed goes on where it was when it is
    started again: neither the solve nor scores that are written are done twice.
    """
    from .influence.config import ConfigError, scores_from_config

    try:
        scores_from_config(config, resume=not restart, progress=False if quiet else None, say=click.echo)
    except (ConfigError, ValueError, TypeError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(run: Path) -> None:
    """Write RUN/report.html: one page about a run of distillation, finished, killed or still going on.

    RUN is the run's folder, the run_dir of Distiller. The page needs no other file and no network.
    """
    from .distill.report import report as write_report

    try:
        click.echo(write_report(run))
    except (ImportError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
def info() -> None:
    """Print versions, what was built, what is active, and why something is not."""
    from .info import format_info

    click.echo(format_info())


if __name__ == "__main__":
    main()
