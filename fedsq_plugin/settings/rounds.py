"""The options of a run as a whole: its algorithm, its rounds, what is tested, and what is saved."""

from __future__ import annotations

from typing import Literal

from ..federation.algorithm import Algorithm
from ..federation.options import Options, option, runs_rounds


def _no_finetuning(finetune_epochs: int | None, algorithm: Algorithm | None) -> str | None:
    own = algorithm.finetune_epochs if algorithm else 0
    return None if (own if finetune_epochs is None else finetune_epochs) else "there is no final fine-tuning"


class ModelOptions(Options):
    """The model."""

    model: str = option(
        ...,
        "model_args",
        "backbone, ours or FedML's; mlp, mlp_bn and flamby/baseline for FLamby's data sets",
        agree=True,
    )
    small_images: bool = option(
        False,
        "fedsq_args",
        "3x3 stem and no first pooling, for small images",
        agree=True,
        idle=lambda model, our_model: None if our_model else f"{model} is none of our models",
    )


class RoundOptions(Options):
    """The rounds of a run."""

    federated_optimizer: str = option(..., "train_args", "algorithm, by its published name", agree=True)
    own_algorithms: bool = option(
        False,
        "fedsq_args",
        "in a script of your own, run the plugin's FedAvg, FedProx, … in place of FedML's loops of those names",
        may_change=True,
    )
    client_num_per_round: int = option(..., "train_args", "silos that train in a round", agree=True, ge=1)
    nonfinite: Literal["skip", "fail"] = option(
        "skip",
        "fedsq_args",
        "an update that is refused (NaN, wrong keys): go on without it, or end",
        may_change=True,
        idle=runs_rounds,
    )


class EvaluationOptions(Options):
    """What is tested, and when."""

    frequency_of_the_test: int = option(1, "validation_args", "rounds from one evaluation to the next", ge=1)
    silo_evaluation: bool | None = option(
        None,
        "fedsq_args",
        "test every silo's own model on its own test data; null: where silos have models of their own",
        differs="the server says when a silo tests",
        idle=runs_rounds,
    )
    finetune_epochs: int | None = option(
        None,
        "fedsq_args",
        "epochs of a final fine-tuning at every silo, tested on its own data; null: 5 for FedBABU, else 0",
        agree=True,
        idle=runs_rounds,
        ge=0,
    )
    finetune_part: Literal["all", "head"] = option(
        "all", "fedsq_args", "what the final fine-tuning trains", agree=True, idle=_no_finetuning
    )


class CheckpointOptions(Options):
    """What is saved, so that a run can be resumed."""

    checkpoint_dir: str | None = option(
        None,
        "fedsq_args",
        "folder of the run's checkpoints; null: none, fedsq run: in the run directory",
        may_change=True,
        idle=runs_rounds,
    )
    checkpoint_every: int = option(1, "fedsq_args", "rounds from one checkpoint to the next", may_change=True, ge=1)
    resume: bool = option(False, "fedsq_args", "go on from the newest checkpoint, where there is one", may_change=True)
