"""What is said where FLamby, what it needs or its data are missing; a package of its name stands for it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedsq_plugin.data.flamby import backbones
from fedsq_plugin.data.flamby.catalogue import CATALOGUE
from fedsq_plugin.data.flamby.package import NO_FLAMBY, FlambyPackage
from fedsq_plugin.errors import ConfigError
from fedsq_plugin.hosts.fedml.devices import NO_GPU
from fedsq_plugin.run.check import check
from fedsq_plugin.run.plan import create_model
from fedsq_plugin.settings.config import Config

RECIPES = Path(__file__).parents[3] / "recipes" / "flamby"

HEART = "flamby/fed_heart_disease"
CENTRE = """
import torch
from torch.utils.data import TensorDataset
BATCH_SIZE, NUM_CLIENTS = 4, 4
BaselineLoss, Baseline = torch.nn.BCELoss, lambda: torch.nn.Linear(13, 1)
def metric(y_true, y_pred):
    return ((y_pred > 0.5) == y_true).mean()
def FedClass(center=0, train=True, pooled=False, data_path=None):
    torch.rand(1)
    return TensorDataset(torch.full((5, 13), float(center)), torch.zeros(5, 1))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A FLamby whose Heart package is CENTRE; the path of that file."""
    known = [name for name in sys.modules if name.split(".")[0] == "flamby"]
    for name in known:
        monkeypatch.delitem(sys.modules, name)
    file = tmp_path / "FLamby" / "flamby" / "datasets" / "fed_heart_disease" / "__init__.py"
    file.parent.mkdir(parents=True)
    for folder in (file.parent.parent, file.parent.parent.parent):
        (folder / "__init__.py").touch()
    file.write_text(CENTRE)
    monkeypatch.syspath_prepend(str(tmp_path / "FLamby"))
    yield file
    for name in [name for name in sys.modules if name.split(".")[0] == "flamby"]:
        del sys.modules[name]


def refused(name: str = HEART, folder: str = "") -> str:
    with pytest.raises(ConfigError) as error:
        FlambyPackage(name, folder).samples(train=True)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_flamby_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsq_plugin.data.flamby.package.find_spec", lambda name: None)
    line = refused()
    assert line.startswith(f"{HEART}: FLamby is not importable")
    assert "git clone https://github.com/owkin/FLamby" in line and "PYTHONPATH" in line


def test_an_unknown_data_set_names_the_nearest() -> None:
    assert "'flamby/fed_heart' is unknown" in refused("flamby/fed_heart") and HEART in refused("flamby/fed_heart")


def test_a_missing_dependency_is_named_as_pip_knows_it(fake: Path) -> None:
    fake.write_text("import efficientnet_pytorch_of_nobody")
    assert "FLamby needs efficientnet_pytorch_of_nobody: pip install " in refused()


def test_a_dependency_that_lacks_a_name_is_a_matter_of_versions(fake: Path) -> None:
    fake.write_text("import numpy\nnumpy.NotThereAnyMore")
    line = refused()
    assert "it does not import here (AttributeError: " in line
    assert line.endswith("pip install 'fedsq-plugin[flamby]' gives the versions with which FLamby works")


def test_a_configuration_that_is_not_finished_says_so(fake: Path, tmp_path: Path) -> None:
    scripts = fake.parent / "dataset_creation_scripts"
    assert f"the data are not there; get them by: cd {scripts} && python download.py" in refused()
    scripts.mkdir()
    place = scripts / "dataset_location.yaml"
    place.write_text(f"dataset_path: {tmp_path}\ndownload_complete: true\npreprocessing_complete: false\n")
    assert "the preprocessing is not finished" in refused()
    place.write_text("download_complete: true\n")
    assert "names no dataset_path" in refused()


def test_flambys_debug_data_are_not_taken_for_the_data(fake: Path) -> None:
    scripts = fake.parent / "dataset_creation_scripts"
    scripts.mkdir()
    (scripts / "dataset_location_debug.yaml").write_text("dataset_path: /tmp\ndownload_complete: true\n")
    assert "the data are not there" in refused()


def test_loading_leaves_the_global_generators_alone(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "processed.va.data").touch()
    fake.write_text("import torch\ntorch.manual_seed(42)\n" + CENTRE)  # as flamby.utils does
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    FlambyPackage(HEART, str(tmp_path)).samples(train=True)
    assert torch.equal(torch.rand(2), expected)


def test_an_mlp_fits_the_data_set(fake: Path) -> None:
    model = backbones.create("mlp", HEART, 1, seed=3)
    again = backbones.create("mlp", HEART, 1, seed=3)
    assert model(torch.zeros(2, 13)).shape == (2, 1) and 0 < float(model(torch.zeros(1, 13)).detach()) < 1
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize(
    ("model", "dataset", "said"),
    [
        ("mlp", "flamby/fed_isic2019", "use the model resnet18 or alexnet"),
        ("mlp", "flamby/fed_ixi", "use the model flamby/baseline"),
        ("mlp", "digits", "is made for one of FLamby's data sets"),
        ("flamby/baseline", "digits", "is made for one of FLamby's data sets"),
    ],
)
def test_a_model_that_does_not_go_with_the_data_set(model: str, dataset: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        backbones.create(model, dataset, 1, seed=0)


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_baseline_without_gates_is_refused_before_it_is_made(name: str) -> None:
    """Without FLamby: ISIC's would fetch weights."""
    instead = CATALOGUE[name].instead
    line = backbones.without_gates("flamby/baseline", name)
    assert line is None if instead is None else str(line).endswith(f"without a gate; use {instead}")
    assert backbones.without_gates("resnet18", name) is None
    if instead is not None:
        rounds = {"comm_round": 1, "client_num_in_total": 4, "client_num_per_round": 4}
        options = {"dataset": name, "model": "flamby/baseline", "federated_optimizer": "FedSQ"}
        with pytest.raises(ConfigError, match=f"under FedSQ: FLamby's own for {name[7:]} is "):
            create_model(Config(**options, **rounds), 1)


def test_the_number_of_silos_is_the_number_of_centres(fake: Path, tmp_path: Path) -> None:
    from fedsq_plugin.data.flamby.centres import load_centres

    (tmp_path / "processed.va.data").touch()
    options = {"dataset": HEART, "model": "mlp", "data_cache_dir": str(tmp_path), "comm_round": 1}
    rounds = {"federated_optimizer": "FedSQ", "client_num_per_round": 3}
    with pytest.raises(ConfigError, match=r"client_num_in_total is 3, and .* has 4 centres; set it to 4"):
        load_centres(Config(**options, **rounds, client_num_in_total=3))
    data = load_centres(Config(**options, **rounds, client_num_in_total=4))
    assert data.outputs == 1 and data.sizes == {0: 5, 1: 5, 2: 5, 3: 5}
    for silo, batches in data.train.items():
        assert all((x == silo).all() for x, _ in batches)  # every loader has its own centre's samples
    assert [len(y) for _, y in data.train[0]] == [5]  # a last batch of one joins FLamby's four


def heart_recipe(folder: Path) -> dict[str, dict[str, Any]]:
    rounds = {"client_num_in_total": 4, "client_num_per_round": 4, "comm_round": 1}
    return {
        "data_args": {"dataset": HEART, "data_cache_dir": str(folder)},
        "model_args": {"model": "mlp"},
        "train_args": {"federated_optimizer": "FedSQ", **rounds},
    }


def test_check_says_what_is_missing(fake: Path, tmp_path: Path) -> None:
    (line,) = check(heart_recipe(tmp_path / "nowhere"))
    assert line.startswith(f"{HEART}: no folder {tmp_path / 'nowhere'}; get them by: cd ")


UNREADABLE = """
class Unreadable:
    def __len__(self):
        return 5
    def __getitem__(self, index):
        raise OSError("gone with the zip")
def FedClass(center=0, train=True, pooled=False, data_path=None):
    return Unreadable()
"""


def test_every_centre_must_have_samples(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "processed.va.data").touch()
    FlambyPackage(HEART, str(tmp_path)).require_all()
    empty = "torch.full((0 if center == 2 and not train and not pooled else 5, 13)"
    fake.write_text(
        CENTRE.replace("torch.full((5, 13)", empty).replace(
            "torch.zeros(5, 1)", "torch.zeros(0 if center == 2 and not train and not pooled else 5, 1)"
        )
    )
    sys.modules.pop("flamby.datasets.fed_heart_disease")
    with pytest.raises(ConfigError, match="centre 2 has no test sample; get them by: cd "):
        FlambyPackage(HEART, str(tmp_path)).require_all()


def test_a_sample_that_cannot_be_read_is_one_line(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "processed.va.data").touch()
    fake.write_text(CENTRE + UNREADABLE)
    line = "the data cannot be had (OSError: gone with the zip); get them by: cd "
    assert refused(folder=str(tmp_path)).startswith(f"{HEART}: {line}")


def test_check_says_which_silo_cannot_be_read(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "processed.va.data").touch()
    fake.write_text(CENTRE + UNREADABLE)
    monkeypatch.setattr(FlambyPackage, "_refuse_other_shape", lambda *_: None)  # as of images
    (line,) = check(heart_recipe(tmp_path))
    assert line == f"data_args.dataset {HEART}: silo 0 cannot be read (OSError: gone with the zip)"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_recipes_lack_nothing_but_flamby(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsq_plugin.data.flamby.package.find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = yaml.safe_load(path.read_text())

    left = [line for line in check(recipe) if NO_FLAMBY not in line and line != NO_GPU]
    assert left == [] and recipe["data_args"]["dataset"] in CATALOGUE


def test_the_extra_has_flambys_pins() -> None:
    root = Path(__file__).parents[3]
    text = (root / "pyproject.toml").read_text()
    extra = text.partition("\nflamby = [")[2].partition("]")[0]
    pins = ("numpy==1.26.4", "pandas<3", "albumentations==1.3.1", "monai==1.2.0", "tensorboard==2.15.2")
    for pin in (*pins, "opacus==1.6.0"):
        assert f'"{pin}"' in extra
