"""The command `fedsq flamby`. Heavy imports wait until it runs."""

from __future__ import annotations

from pathlib import Path

import click


@click.group("flamby")
def command() -> None:
    """FedSQ, and the other algorithms, in FLamby's own benchmark."""


@command.command("fed_benchmark", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.option(
    *("--config", "--config-file-path", "-cfp"),
    type=click.Path(path_type=Path),
    required=True,
    help="FLamby's configuration, a JSON file as those in recipes/flamby.",
)
@click.option("--backbone", default="baseline", show_default=True, help="mlp, resnet18, alexnet, …")
@click.option("--weights", metavar="FILE", help="What the backbone begins with; or imagenet.")
@click.option(
    "--only", metavar="NAME,…", help="Run these of the configuration's strategies; --strategy leaves out their options."
)
@click.option(
    *("--results", "--results-file-path", "-rfp"),
    type=click.Path(path_type=Path),
    help="CSV of the results; default: what the configuration says.",
)
@click.option(*("--seeds", "--seed"), default="0", show_default=True, metavar="0,1,…", help="A run for each of them.")
@click.pass_context
def fed_benchmark(
    context: click.Context,
    config: Path,
    backbone: str,
    weights: str | None,
    only: str | None,
    results: Path | None,
    seeds: str,
) -> None:
    """Run FLamby's fed_benchmark.py with our strategies in it. All other options are its own."""
    from ...run.compare import parse_seeds
    from . import benchmark

    names = only.split(",") if only else []
    benchmark.fed_benchmark(config, context.args, backbone, weights, parse_seeds(seeds), results, names)
