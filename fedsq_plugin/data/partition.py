"""Divide the samples of a labelled data set over silos."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, nearest

Labels = npt.NDArray[np.int64]
_DRAWS = 1000

METHODS = ("homo", "hetero")
"""FedML's names for i.i.d., and for Dirichlet(alpha) over the silos, class by class."""


def partition(labels: Labels, silos: int, method: str, alpha: float, seed: int, min_size: int = 1) -> list[Labels]:
    """The indices of every silo's samples, ascending. Every sample goes to one silo.

    `hetero` splits each class by proportions drawn from Dirichlet(alpha) (Hsu et al. 2019,
    arXiv 1909.06335), and draws again until every silo has `min_size` samples.

    Raises:
        ConfigError: unknown method, or no partition with `min_size` samples per silo was found.
    """
    if method not in METHODS:
        raise ConfigError(f"partition_method is '{method}'{nearest(method, METHODS)}")
    if silos * min_size > len(labels):
        raise ConfigError(
            f"{len(labels)} samples cannot give {silos} silos {min_size} each; "
            "lower client_num_in_total or min_client_samples"
        )
    generator = np.random.default_rng(seed)
    if method == "homo":
        order = generator.permutation(len(labels))
        return [np.sort(part) for part in np.array_split(order, silos)]
    if not alpha > 0:
        raise ConfigError(f"partition_alpha is {alpha}; a Dirichlet needs a number above 0")
    members = [generator.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    for _ in range(_DRAWS):
        shares = generator.dirichlet(np.full(silos, alpha), size=len(members))
        parts = _split(members, shares)
        if min(len(part) for part in parts) >= min_size:
            return parts
    raise ConfigError(
        f"no Dirichlet({alpha}) partition gives each of {silos} silos {min_size} samples in {_DRAWS} draws; "
        "raise partition_alpha, or lower min_client_samples or client_num_in_total"
    )


def partition_like(labels: Labels, like: list[Labels], seed: int) -> list[Labels]:
    """Divide the test samples so that each silo's classes are distributed as in its training data.

    Args:
        labels: of the test samples.
        like: labels of every silo's training samples. A class that no silo has is divided evenly.
    """
    generator = np.random.default_rng(seed)
    classes = np.unique(labels)
    counts = np.array([[np.sum(part == c) for part in like] for c in classes], dtype=float)
    counts[counts.sum(1) == 0] = 1.0
    members = [generator.permutation(np.flatnonzero(labels == c)) for c in classes]
    return _split(members, counts / counts.sum(1, keepdims=True))


def _split(members: list[npt.NDArray[np.int64]], shares: npt.NDArray[np.float64]) -> list[Labels]:
    """Give every silo its share of each class.

    Args:
        members: indices of each class's samples, in the order in which they are given out.
        shares: (classes, silos), each row with the sum 1.
    """
    parts: list[list[Labels]] = [[] for _ in range(shares.shape[1])]
    for indices, share in zip(members, shares, strict=True):
        cuts = np.rint(np.cumsum(share)[:-1] * len(indices)).astype(int)
        for part, piece in zip(parts, np.split(indices, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def count_labels(parts: list[Labels], classes: int) -> list[list[int]]:
    """The number of samples of every silo (rows) per class (columns), from the silos' labels."""
    return [np.bincount(part, minlength=classes).tolist() for part in parts]
