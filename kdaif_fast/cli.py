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


@main.command()
def info() -> None:
    """Print versions, what was built, what is active, and why something is not."""
    from .info import format_info

    click.echo(format_info())


if __name__ == "__main__":
    main()
