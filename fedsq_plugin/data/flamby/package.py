"""FLamby's own packages of data sets. Whatever is missing or fails there is said in one line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...errors import ConfigError, in_one_line, nearest
from ...federation.seeding import derive, isolated
from ...federation.task import MeanOverBatches, Metric, OfPredictions, Task
from .catalogue import CATALOGUE

NO_FLAMBY = (
    "FLamby is not importable, and is not on the package index: "
    "git clone https://github.com/owkin/FLamby, put that folder on PYTHONPATH, "
    "and pip install 'fedsq-plugin[flamby]'"
)
PINS = "pip install 'fedsq-plugin[flamby]' gives the versions with which FLamby works"


class FlambyPackage:
    """`flamby.datasets.<name>` and its data.

    Args:
        name: as in a recipe, `flamby/fed_ixi`.
        folder: where the data are; "": where FLamby's own configuration says.

    Raises:
        ConfigError: the name is unknown; FLamby, what it needs, the data or the licence is missing.
    """

    def __init__(self, name: str, folder: str = "") -> None:
        if name not in CATALOGUE:
            raise ConfigError(f"data_args.dataset '{name}' is unknown{nearest(name, CATALOGUE)}")
        self.about, self._folder = CATALOGUE[name], folder
        self.module = import_flamby(f"flamby.datasets.{self.about.name}", self.about.key)
        self._own: Any = getattr(self.module, "Baseline", None)

    @property
    def batch_size(self) -> int:
        """FLamby's own batch size, for training."""
        return int(self.module.BATCH_SIZE)

    @property
    def collate(self) -> Any:
        """The function that makes a batch of samples; None: torch's own way."""
        return getattr(self.module, "collate_fn", None)

    def task(self) -> Task:
        """FLamby's loss, and its metric, applied as FLamby's own benchmark applies it."""
        with self._named("its loss"):
            return Task(self.module.BaselineLoss(), self._metric())

    def _metric(self) -> Metric:
        name, measure = self.about.metric, self.module.metric
        if self.about.over == "labels":
            softmax = self.module.softmax_helper
            return MeanOverBatches(name, lambda targets, outputs: measure(softmax(outputs).argmax(1), targets))
        if self.about.over == "scan":
            return MeanOverBatches(name, lambda targets, outputs: measure(targets.numpy()[None], outputs.numpy()[None]))
        return OfPredictions(name, measure)

    def centres(self) -> int:
        """The number of centres. Synthetic data have as many as were generated."""
        if self.about.generated:
            return len(self.samples(train=True, pooled=True).center_names)  # type: ignore[attr-defined]
        return int(self.module.NUM_CLIENTS)

    def require_all(self) -> None:
        """Raise ConfigError where the data, a centre's part of them, or their licence is missing."""
        self.samples(train=True, pooled=True)
        there, trained = self.centres(), self.module.NUM_CLIENTS
        if there != trained:
            raise ConfigError(
                f"{self.about.key}: the data have {there} centres, and FLamby trains {trained}; {self._how()}"
            )
        for train, split in ((True, "training"), (False, "test")):
            for centre in range(trained):
                if not len(self.samples(train, centre)):  # type: ignore[arg-type]
                    raise ConfigError(f"{self.about.key}: centre {centre} has no {split} sample; {self._how()}")

    def require_device(self, gpu: bool) -> None:
        """Raise ConfigError where a GPU is needed and none is to be used."""
        if self.about.needs_gpu and not gpu:
            raise ConfigError(
                f"{self.about.key}: FLamby's loss for it runs on a GPU only; under FedML, set "
                "device_args.using_gpu: true"
            )

    def samples(self, train: bool, centre: int = 0, pooled: bool = False, seed: int = 0) -> Dataset[Any]:
        """The training or test split of a centre, or of all centres together."""
        path = self._path()
        given = {} if path is None else {"data_path": str(path)}
        # ISIC's constructor draws an augmentation, Camelyon's seeds python's generator.
        with isolated(derive("flamby", seed, centre)), self._named("the data"):
            found: Dataset[Any] = self.module.FedClass(center=centre, train=train, pooled=pooled, **given)
        self._refuse_other_shape(found)
        return found

    def loaders(self) -> list[DataLoader[Any]]:
        """The training data of all centres, in batches as FLamby's benchmark makes them."""
        about: dict[str, Any] = {"batch_size": self.batch_size, "shuffle": True, "collate_fn": self.collate}
        return [DataLoader(self.samples(True, centre), **about) for centre in range(self.centres())]

    def inputs(self) -> Tensor:
        """The inputs of one training sample, as a batch of one."""
        samples = self.samples(train=True)
        with isolated(0), self._named("the data"):
            inputs: Tensor = next(iter(DataLoader(samples, batch_size=1, collate_fn=self.collate)))[0]
        return inputs

    def baseline(self, *arguments: Any) -> Any:
        """FLamby's own model."""
        with self._named("its Baseline"):
            return self._own(*arguments)

    def _refuse_other_shape(self, samples: Any) -> None:
        wanted = self.about.features
        if wanted is None or not len(samples):
            return
        with self._named("the data"):
            found = len(samples[0][0])
        if found != wanted:
            raise ConfigError(
                f"{self.about.key}: the samples have {found} features, FLamby's baseline takes {wanted}; "
                f"generate the data anew: {self._how()}"
            )

    def _path(self) -> Path | None:
        """The folder to hand to FLamby; None where FLamby finds it by itself."""
        about = self.about
        if not about.takes_path and self._folder:
            raise ConfigError(f"data_args.data_cache_dir: {about.key} is read from FLamby's own place; leave it out")
        if not about.get:
            # FLamby asks for the licence on standard input when the data are first read; the user must answer that.
            if not (self._scripts() / f"license_agreement_{about.name}").is_file():
                raise ConfigError(
                    f"{about.key}: its data terms are not accepted yet; read them and answer FLamby: "
                    f'python -c "from flamby.datasets.{about.name} import FedClass; FedClass()"'
                )
            return None
        folder = Path(self._folder).expanduser() if self._folder else self._configured()
        if not folder.is_dir():
            raise ConfigError(f"{about.key}: no folder {folder}; {self._how()}")
        if next(folder.glob(about.files), None) is None:
            raise ConfigError(f"{about.key}: {folder} holds no {about.files}; {self._how()}")
        if about.not_in_path and about.not_in_path in str(folder).lower():
            raise ConfigError(
                f"{about.key}: FLamby takes every file for test data whose path has '{about.not_in_path}' in "
                f"it; move {folder} to a folder without"
            )
        return folder if about.takes_path else None

    def _configured(self) -> Path:
        """The folder that FLamby's own configuration names. FLamby itself would also take the configuration of its
        debug data."""
        import yaml

        file = self._scripts() / "dataset_location.yaml"
        try:
            options = yaml.safe_load(file.read_text())
        except FileNotFoundError:
            where = ", or, under FedML, set data_args.data_cache_dir" if self.about.takes_path else ""
            raise ConfigError(f"{self.about.key}: the data are not there; {self._how()}{where}") from None
        if not isinstance(options, dict) or not isinstance(options.get("dataset_path"), str):
            raise ConfigError(f"{self.about.key}: {file} names no dataset_path; {self._how()}")
        for key, step in (("download_complete", "download"), ("preprocessing_complete", "preprocessing")):
            if not options.get(key):
                raise ConfigError(f"{self.about.key}: the {step} is not finished ({file}); {self._how()}")
        return Path(options["dataset_path"])

    def _scripts(self) -> Path:
        return Path(str(self.module.__file__)).parent / "dataset_creation_scripts"

    def _how(self) -> str:
        """The commands that get the data and ask for the licence, in words."""
        if not self.about.get:
            return f"see {self._scripts().parent / 'README.md'}"
        before = f"{self.about.before}, then " if self.about.before else ""
        return f"get them by: {before}cd {self._scripts()} && {' && '.join(self.about.get)}"

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            with _quietly():
                yield
        except Exception as error:
            remedy = f"; {self._how()}" if what == "the data" else ""
            if isinstance(error, (AttributeError, TypeError, ImportError)):
                remedy = f"; {PINS}"  # FLamby uses a name that a later version of its dependencies does not have
            raise ConfigError(f"{self.about.key}: {what} cannot be had ({in_one_line(error)}){remedy}") from None


def import_flamby(module: str, why: str) -> Any:
    """Import a module of FLamby's. Raises ConfigError, which begins with `why`, where that fails."""
    if find_spec("flamby") is None:
        raise ConfigError(f"{why}: {NO_FLAMBY}")
    # FLamby seeds torch when it is imported, and nnU-Net prints.
    with isolated(0), _quietly():
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            package = _PACKAGES.get(str(error.name), str(error.name))
            what = f"needs {error.name}: pip install {package}"
            if not package.startswith("--no-deps"):  # which no extra can have
                what += f", or: {PINS}"
            if str(error.name).startswith("flamby"):
                what = f"is incomplete (no {error.name}): {NO_FLAMBY.partition(': ')[2]}"
            raise ConfigError(f"{why}: FLamby {what}") from None
        except Exception as error:
            raise ConfigError(f"{why}: it does not import here ({in_one_line(error)}); {PINS}") from None


_PACKAGES = {
    "sklearn": "scikit-learn",
    "efficientnet_pytorch": "efficientnet-pytorch",
    "nnunet": "--no-deps nnunet==1.7.0",
    "openslide": "openslide-python",
    "xlrd": "xlrd",
}
"""What pip installs for a module, where the names differ."""


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide what FLamby prints; warnings and logs stay."""
    with open(os.devnull, "w") as nowhere:
        out, sys.stdout = sys.stdout, nowhere
        try:
            yield
        finally:
            sys.stdout = out
