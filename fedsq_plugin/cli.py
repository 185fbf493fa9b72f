"""The command `fedsq`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .errors import ConfigError, FedSQError
from .run.host import command, host

if TYPE_CHECKING:
    from .settings.recipe import Families

_PATH = click.Path(path_type=Path)
_settings = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override an option of the recipe, by KEY or FAMILY.KEY.",
)
_out = click.option("--out", type=_PATH, help="Run directory; default runs/<recipe>-<time>.")
_resume = click.option(
    "--resume", type=_PATH, metavar="DIR", help="Go on with the run in DIR that was cut off, by its own recipe."
)


@contextmanager
def _begun_or_new(
    recipe: Path | None, settings: tuple[str, ...], out: Path | None, resume: Path | None
) -> Iterator[tuple[Families, Path, dict[str, Any]]]:
    """The recipe, the run directory, and the summary of a run that goes on."""
    host().require()
    from .results.rundir import RunDirectory
    from .run import session
    from .settings.recipe import overridden, read_yaml

    if resume is None:
        if recipe is None:
            raise ConfigError("name a RECIPE, or --resume DIR")
        families = overridden(read_yaml(recipe), settings, host().options)
        with nullcontext(out) if out is not None else session.new_folder(recipe) as folder:
            yield families, folder, {}
        return
    if recipe is not None or settings or out is not None:
        raise ConfigError(f"--resume {resume} goes on by the recipe in that folder: give nothing else")
    directory = RunDirectory.resume(resume)
    yield directory.config, resume, directory.summary


class _Group(click.Group):
    """A group whose `lazy` commands belong to hosts, and are imported when they are asked for."""

    lazy = ("flamby",)

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *self.lazy])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return command(name) if name in self.lazy else super().get_command(context, name)


HELP = {"help_option_names": ["-h", "--help"]}


@click.group(cls=_Group, context_settings=HELP, invoke_without_command=True)
@click.version_option(__version__, prog_name="fedsq")
@click.pass_context
def cli(context: click.Context) -> None:
    """FedSQ in FedML: federated fine-tuning under the gates of a frozen structural copy."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
@click.argument("recipe", type=_PATH, required=False)
@_settings
@_out
@_resume
def run(recipe: Path | None, settings: tuple[str, ...], out: Path | None, resume: Path | None) -> None:
    """Run RECIPE, a FedML YAML, and write its metrics, tables and pictures."""
    with _begun_or_new(recipe, settings, out, resume) as (families, folder, summary):
        from .run import run as runs

        if "algorithms_compared" in summary:
            raise ConfigError(f"--resume {resume}: it is a comparison; use fedsq compare --resume {resume}")
        runs.run(families, folder, _console(), resume=resume is not None)


@cli.command()
@click.argument("recipe", type=_PATH, required=False)
@click.option("--clients", type=click.IntRange(min=1), help="Client processes; default: worker_num, or one per silo.")
@click.option("--tls", is_flag=True, help="Mutual TLS (GRPC), with certificates made for this run alone.")
@_settings
@_out
@_resume
def launch(
    recipe: Path | None,
    clients: int | None,
    tls: bool,
    settings: tuple[str, ...],
    out: Path | None,
    resume: Path | None,
) -> None:
    """Run RECIPE, of backend MPI or GRPC, with all its processes on this machine."""
    with _begun_or_new(recipe, settings, out, resume) as (families, folder, _):
        from . import launch as launcher

        raise SystemExit(launcher.launch(families, clients, folder, tls, resume is not None))


@cli.command(hidden=True)
@click.argument("recipe", type=_PATH)
@click.option("--rank", type=int, help="Of this process; MPI knows it.")
@click.option("--plain", is_flag=True, help="No terminal is behind standard output, though it looks so.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option("--endings", type=_PATH, help="Folder for a file that says why it ended.")
@_out
def node(recipe: Path, rank: int | None, plain: bool, resume: bool, endings: Path | None, out: Path) -> None:
    """One process of a run of several processes."""
    from . import launch as launcher
    from .settings.recipe import read_yaml

    launcher.node(read_yaml(recipe), rank, out, _console(plain), resume, endings)


@cli.command()
@click.argument("recipe", type=_PATH, required=False)
@click.option(
    "--algorithms",
    default="",
    metavar="A,B,…",
    help="By name, with options of its own if wanted: FedSQ:structural_copy=ema.",
)
@click.option("--seeds", default="0", show_default=True, metavar="0,1,…", help="Values of random_seed.")
@_settings
@_out
@_resume
def compare(
    recipe: Path | None, algorithms: str, seeds: str, settings: tuple[str, ...], out: Path | None, resume: Path | None
) -> None:
    """Run RECIPE with several algorithms and seeds, all else equal, and compare them."""
    with _begun_or_new(recipe, settings, out, resume) as (families, folder, summary):
        from .run import compare as comparisons

        if resume is not None:
            if "algorithms_compared" not in summary:
                raise ConfigError(f"--resume {resume}: it is no comparison; use fedsq run --resume {resume}")
            labels, numbers = summary["algorithms_compared"], summary["seeds"]
            comparisons.compare(families, labels, numbers, folder, _console(), resume=True)
            return
        numbers = comparisons.parse_seeds(seeds)
        names = [name.strip() for name in algorithms.split(",") if name.strip()]
        if not names:
            raise ConfigError("--algorithms is empty; name at least one, as FedAvg,FedSQ")
        comparisons.compare(families, names, numbers, folder, _console())


@cli.command()
@click.argument("directory", type=_PATH)
@click.option("--clients", type=click.IntRange(min=1), required=True, help="Client processes.")
@click.option("--days", type=click.IntRange(min=1, max=3650), default=30, show_default=True, help="Validity.")
def certificates(directory: Path, clients: int, days: int) -> None:
    """Make certificates and keys in DIRECTORY for a GRPC run under mutual TLS."""
    from .wire.certificates import write

    write(directory, clients, days)
    click.echo(
        f"{directory}: ca.pem for everybody; rank-<k>.pem and rank-<k>-key.pem for rank <k> alone "
        f"(0: the server); valid for {days} days"
    )


@cli.command()
@click.argument("directory", type=_PATH)
def report(directory: Path) -> None:
    """Make tables and pictures anew from the metrics in DIRECTORY."""
    from .results.report import write_report
    from .results.rundir import RunDirectory

    console = _console()
    console.print(write_report(RunDirectory.open(directory)))
    console.print(f"pictures and summary.json in {directory} are new", highlight=False)


@cli.command()
@click.argument("recipe", type=_PATH)
@_settings
def check(recipe: Path, settings: tuple[str, ...]) -> None:
    """Say everything that is wrong with RECIPE, at once. Nothing is trained or downloaded."""
    from .run import check as checks
    from .run.facts import facts_of
    from .settings.idle import compiled_for_cpu, untrained_gates
    from .settings.recipe import flat, overridden, read_loosely

    families, repeated = read_loosely(recipe)
    families = overridden(families, settings, host().options)
    found = [*map(str, repeated), *checks.check(families)]
    for line in found:
        click.echo(f"{recipe}: {line}")
    values = flat(families)
    for line in [*checks.notes(families), *untrained_gates(values, facts_of(values)), *compiled_for_cpu(values)]:
        if line not in found:
            click.echo(f"note: {line}")
    if found:
        raise SystemExit(2)
    click.echo(f"{recipe}: nothing wrong")


@cli.command()
def algorithms() -> None:
    """List the algorithms: their five choices, the options that they read, and where they come from."""
    from rich import box
    from rich.table import Table

    from .algorithms import algorithms as all_algorithms
    from .federation.algorithm import CHOICES

    tables = []
    for titles in (("name", *CHOICES), ("name", "options", "source")):
        table = Table(*titles, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for algorithm in all_algorithms().values():
            cells = {**algorithm.described(), "options": ", ".join(algorithm.option_names) or "–"}
            table.add_row(*(cells[title] for title in titles))
        tables.append(table)
    console = _console()
    console.print(*tables, sep="\n\n")
    console.print("\nNames joined by + are combined, as FedSQ+FedMR; options are described in the README.")


def _console(plain: bool = False) -> Any:
    from rich.console import Console

    # Piped into a file, a table needs no folding at 80 columns.
    plain = plain or not sys.stdout.isatty()
    # This stream now: while FedML runs, what is printed goes to its log file.
    return Console(file=sys.stdout, force_terminal=not plain, width=100 if plain else None)


def main() -> None:
    """Entry point: what the user can mend is one line and exit status 2."""
    try:
        cli(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        fail("interrupted", status=130)
    except click.ClickException as error:
        fail(error.format_message())
    except FedSQError as error:
        fail(str(error))


def fail(message: str, status: int = 2) -> None:
    """End the process with one line on standard error; under MPI, the others with it."""
    print(f"fedsq: error: {' '.join(message.split())}", file=sys.stderr)
    host().end_processes(status)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
