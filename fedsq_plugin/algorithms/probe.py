"""Algorithms that begin with the head on frozen features: LP-FT, and FedNCM's class means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dualcopy.precision import to_device
from ..errors import ConfigError
from ..federation.algorithm import EVERYTHING, HEAD, Algorithm, FederationOptions, Phases, everything
from ..federation.local import Part, Phase, Statistics
from ..federation.options import Options, option
from ..federation.reading import Batch, call, move
from ..federation.state import State


class LpFtOptions(Options):
    probe_rounds: int = option(1, "fedsq_args", "LP-FT's rounds on the head alone", agree=True, ge=0)


class ProbeRounds(LpFtOptions, FederationOptions):
    """What LP-FT's phases read."""


def probe_first(options: ProbeRounds, round: int) -> Sequence[Part]:
    """The head on frozen features for the first rounds, then everything (Kumar et al. 2022, arXiv 2202.10054; in
    federated learning Nguyen et al. 2022, arXiv 2206.15387)."""
    return (Phase(options.epochs, HEAD if round < options.probe_rounds else EVERYTHING),)


def class_means_first(options: FederationOptions, round: int) -> Sequence[Part]:
    """The head from class means in the first round, then everything (arXiv 2306.03937).

    Silos send sums, so that the means are those of all data together, however the data are divided. The means are
    scaled to length one, so that no counts are needed: the head's largest output is then that of the mean with the
    smallest angle to the features. The scaling is reconstructed.
    """
    if round:
        return everything(options, round)
    assert options.head is not None
    means = ClassMeans(options.head)
    return (Statistics(means.collect, means.apply, means.expected),)


_SUMS = "class sums"


@dataclass(frozen=True)
class ClassMeans:
    """FedNCM's head, from sums over the data of all silos."""

    head: str
    """Its module path."""

    def collect(self, model: nn.Module, batches: Iterable[Batch], device: torch.device | str) -> dict[str, Tensor]:
        """What a silo adds up: the head's inputs by label, as a tensor (classes, features)."""
        layer = model.get_submodule(self.head)
        if not isinstance(layer, nn.Linear):
            raise ConfigError(f"head '{self.head}' is {type(layer).__name__}: class means need an nn.Linear")
        features: list[Tensor] = []

        def keep(_: nn.Module, args: Any) -> None:
            features[:] = [args[0].detach().double()]

        total = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64, device=device)
        mode, handle = model.training, layer.register_forward_pre_hook(keep)
        try:
            model.eval()
            with torch.no_grad():
                for inputs, labels in batches:
                    _refuse_other_targets(labels, layer.out_features)
                    call(model, move(inputs, device))
                    total.index_add_(0, to_device(labels, device).long(), features[0])
        finally:
            handle.remove()
            model.train(mode)
        return {_SUMS: total.cpu()}

    def expected(self, state: State) -> dict[str, Tensor]:
        """Zeros of the shapes and dtypes that a silo must send."""
        return {_SUMS: torch.zeros(state[f"{self.head}.weight"].shape, dtype=torch.float64)}

    def apply(self, state: State, totals: Mapping[str, Tensor]) -> State:
        """The server's model with the head that the totals give. A class without a sample gets zeros."""
        weight, bias = f"{self.head}.weight", f"{self.head}.bias"
        changed = State(state)
        changed[weight] = nn.functional.normalize(totals[_SUMS], dim=1).to(state[weight].dtype)
        if bias in state:
            changed[bias] = torch.zeros_like(state[bias])
        return changed


def _refuse_other_targets(targets: Tensor, classes: int) -> None:
    broken = targets.is_floating_point() and not torch.equal(targets, targets.round())
    if targets.dim() != 1 or broken:
        shape = "x".join(map(str, targets.shape))
        raise ConfigError(
            f"class means need one class label a sample, and the targets of a batch are {shape} "
            f"{targets.dtype}: use another algorithm"
        )
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise ConfigError(
            f"class means: labels from {targets.min()} to {targets.max()} for a head of {classes} outputs"
        )


LP_FT = Algorithm(
    "LP-FT",
    "Kumar et al. 2022, arXiv 2202.10054",
    phases=Phases("head first", probe_first, needs_head=True),
    options=LpFtOptions,
)
FEDNCM = Algorithm(
    "FedNCM",
    "Legate et al. 2023, arXiv 2306.03937",
    phases=Phases("class means first", class_means_first, needs_head=True),
)
