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


def _example(text: str) -> str:
    """The last part of the help, in lines that click leaves as they are."""
    return "An example of the file:\n\n\b\n" + "\n".join(line or " " for line in text.splitlines())


class _WithExample(click.Command):
    """A command whose help ends with an example of its file, which is not imported before."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The example, from the module beside the command's own."""
        if self.name == "scores":
            from .influence.config import EXAMPLE
        else:
            from .distill.config.reading import EXAMPLE
        self.epilog = _example(EXAMPLE)
        super().format_epilog(ctx, formatter)


@main.command(cls=_WithExample)
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
    from ._config import ConfigError
    from .influence.config import scores_from_config

    try:
        scores_from_config(config, resume=not restart, progress=False if quiet else None, say=click.echo)
    except (ConfigError, ValueError, TypeError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


@main.command(cls=_WithExample)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="In place of what the file has, as in --set run.epochs=50; may be given many times.",
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="The run's folder, in place of the file's run.dir."
)
@click.option("--check", is_flag=True, help="Only say whether it can be run: everything is checked, nothing written.")
@click.option("--restart", is_flag=True, help="Start over: what a run before has left in the folder is removed.")
@click.option("--quiet", is_flag=True, help="No progress bar (there is none anyway where output is no terminal).")
def distill(config: Path, changes: tuple[str, ...], out: Path | None, check: bool, restart: bool, quiet: bool) -> None:
    """Distil a student from a teacher with weights from influence, as the file CONFIG describes it.

    Everything is checked before anything is trained or written. A run that was stopped goes on where it was when it is
    started again. The run's folder then has a log, a checkpoint, the student (student.safetensors) and a report.
    """
    from ._config import ConfigError
    from .distill.config.command import distill_from_config

    try:
        distill_from_config(
            config,
            changes=changes,
            out=out,
            resume=not restart,
            check=check,
            progress=False if quiet else None,
            say=click.echo,
        )
    except (ConfigError, ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(run: Path) -> None:
    """Write RUN/report.html: one page about a run of distillation, finished, killed or still going on.

    RUN is the run's folder, the run_dir of Distiller. The page needs no other file and no network.
    """
    from .distill.runs.report import report as write_report

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
