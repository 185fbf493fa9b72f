"""The options that name a data set and say how its samples come to the silos."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator
from pydantic_core import PydanticCustomError

from ..federation.device import DeviceOptions
from ..federation.options import Options, option
from ..federation.seeding import Seeds, hosts_own_data


def _centres(dataset: str, centres: bool) -> str | None:
    return f"the centres of {dataset} are the silos" if centres else None


def _divided(dataset: str, divided: bool) -> str | None:
    return f"{dataset} comes divided over silos" if divided else None


def no_public_split(warm_start: str, relu_ise: bool) -> str | None:
    """An idle rule for what only a public split needs."""
    return f"warm_start is '{warm_start}'" if warm_start != "public" and not relu_ise else None


class PublicSplit(Options):
    """Whether a share of the training data goes to no silo, and how large it is."""

    warm_start: Literal["none", "imagenet", "file", "public"] = option(
        "none",
        "warm_start_args",
        "pretrained weights: torchvision's, a file's, or by training on a public split",
        agree=True,
    )
    warm_start_public: float = option(
        0.2,
        "warm_start_args",
        "share of the training data that is public: held by no silo (warm_start: public, or relu_ise)",
        agree=True,
        idle=no_public_split,
        gt=0,
        lt=1,
    )
    warm_start_batch_size: int = option(
        32,
        "warm_start_args",
        "batch size on the public split",
        differs="the server alone trains on the public split",
        idle=no_public_split,
        ge=2,
    )
    relu_ise: bool = option(
        False,
        "warm_start_args",
        "turn GELU, SiLU and Hardswish into ReLU on the public split, before the first round (λ-GELU)",
        agree=True,
    )

    @property
    def has_public_split(self) -> bool:
        """Whether a share of the training data goes to no silo."""
        return self.warm_start == "public" or self.relu_ise


class DataOptions(Seeds, PublicSplit, DeviceOptions):
    """A data set, and what each silo holds of it. Some of FLamby's data sets need a GPU, or none."""

    dataset: str = option(
        ..., "data_args", "digits, image_folder, flamby/fed_… (FLamby's), or a data set that FedML knows", agree=True
    )
    data_cache_dir: str = option(
        "",
        "data_args",
        "folder of the data set's files; empty, for FLamby's: as FLamby is configured",
        differs="files lie elsewhere on every machine",
        may_change=True,
    )
    partition_method: str = option(
        "hetero", "data_args", "homo (i.i.d.) or hetero (Dirichlet)", agree=True, idle=(_centres, _divided)
    )
    partition_alpha: float = option(
        0.5, "data_args", "alpha of the Dirichlet partition", agree=True, idle=(_centres, _divided), gt=0
    )
    client_num_in_total: int = option(..., "train_args", "number of silos", agree=True, ge=1)
    batch_size: int | None = option(
        None, "train_args", "samples per step; null: FLamby's own, else 32; -1: a silo's data at once", agree=True
    )
    image_size: int | None = option(
        None,
        "fedsq_args",
        "resize images to this many pixels a side",
        agree=True,
        idle=(_centres, hosts_own_data),
        ge=1,
    )
    min_client_samples: int = option(
        2, "fedsq_args", "least number of samples of a silo", agree=True, idle=(_centres, hosts_own_data), ge=0
    )

    @field_validator("batch_size")
    @classmethod
    def _size(cls, value: int | None) -> int | None:
        if value is not None and value < 1 and value != -1:
            raise PydanticCustomError("size", "Use a number above 0, or -1 for all data")
        return value
