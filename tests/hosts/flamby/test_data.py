"""FLamby's data sets under FedML: the real FLamby and the real FedML, on real files or stand-ins."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from fedsq_plugin.federation.evaluate import evaluate
from fedsq_plugin.federation.seeding import isolated
from fedsq_plugin.run.check import check
from fedsq_plugin.settings.config import OPTIONS, Config, family_of

from . import standins

pytestmark = standins.needs_flamby
HEART = Path(os.environ.get("FLAMBY_HEART", "/work/shared/data/heart_disease"))
"""The UCI's four processed.*.data files."""
LIMIT_S = 200
needs_heart = pytest.mark.skipif(
    not HEART.is_dir(), reason="needs the Heart Disease files: FLAMBY_HEART=the folder that FLamby's download.py filled"
)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`flamby.datasets` of a copy, which the stand-ins change; the checkout stays as it is."""
    root = tmp_path_factory.mktemp("FLamby")
    found = standins.copied(root)
    standins.forget_flamby()
    sys.path.insert(0, str(root))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        yield found
    sys.path.remove(str(root))
    standins.forget_flamby()


def package(name: str) -> Any:
    try:
        return importlib.import_module(f"flamby.datasets.{name}")
    except ImportError as error:
        pytest.skip(f"needs {error.name}: pip install -e '.[flamby]', and what FLamby's {name} asks for")


def families(dataset: str, folder: Path | str = "", **options: Any) -> dict[str, dict[str, Any]]:
    values: dict[str, Any] = {
        **{"training_type": "simulation", "random_seed": 0, "backend": "sp", "threads": 1},
        **{"dataset": f"flamby/{dataset}", "data_cache_dir": str(folder), "federated_optimizer": "FedSQ"},
        **{"comm_round": 1, "epochs": 1, "client_optimizer": "adam", "learning_rate": 0.001},
        "silo_evaluation": True,
        **options,
    }
    values.setdefault("client_num_per_round", values["client_num_in_total"])
    found: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        found.setdefault(family_of(key) if key in OPTIONS else "train_args", {})[key] = value
    return found


def config(recipe: dict[str, dict[str, Any]]) -> Config:
    return Config(**{key: value for family in recipe.values() for key, value in family.items()})


def run(recipe: dict[str, dict[str, Any]], folder: Path) -> tuple[list[Any], Any]:
    """The records of the rounds, and the outcome."""
    from fedsq_plugin.hosts.fedml.execute import execute

    assert check(recipe) == []
    records: list[Any] = []
    outcome = execute(recipe, folder / "fedml.log", lambda start: None, records.append)
    return records, outcome


@pytest.fixture(scope="module")
def heart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heart") / "files"
    shutil.copytree(HEART, folder)
    return folder


def heart_recipe(folder: Path, **options: Any) -> dict[str, dict[str, Any]]:
    chosen = {"model": "mlp", "client_num_in_total": 4, "comm_round": 2, **options}
    return families("fed_heart_disease", folder, **chosen)


@pytest.fixture(scope="module")
def in_one_process(datasets: Path, heart: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Any]:
    package("fed_heart_disease")
    return run(heart_recipe(heart), tmp_path_factory.mktemp("sp"))


@needs_heart
def test_the_centres_are_flambys_own_split(datasets: Path, heart: Path) -> None:
    from fedsq_plugin.data.flamby.centres import load_centres

    flamby = package("fed_heart_disease")
    data = load_centres(config(heart_recipe(heart)))
    # FLamby's published sizes
    assert data.sizes == {0: 199, 1: 172, 2: 30, 3: 85} and data.global_test_size == 254
    assert {silo: len(part.dataset) for silo, part in data.test.items()} == {0: 104, 1: 89, 2: 16, 3: 45}
    assert (len(data.global_train.dataset), len(data.global_test.dataset), data.outputs) == (486, 254, 1)
    assert {len(y) for _, y in data.train[2]} <= {flamby.BATCH_SIZE, 2, 5}
    for silo in range(4):  # loaders belong to their client
        own = flamby.FedClass(center=silo, train=True, data_path=str(heart))
        assert {tuple(own[n][0].tolist()) for n in range(len(own))} == {
            tuple(x.tolist()) for batch, _ in data.train[silo] for x in batch
        }
    assert data.task.metric.name == "accuracy" and isinstance(data.task.loss, flamby.BaselineLoss)


@needs_heart
def test_the_recipes_batch_size_goes_before_flambys(datasets: Path, heart: Path) -> None:
    from fedsq_plugin.data.flamby.centres import load_centres

    package("fed_heart_disease")
    data = load_centres(config(heart_recipe(heart, batch_size=10)))
    assert [len(y) for _, y in data.train[2]] == [10, 10, 10]


@needs_heart
def test_heart_in_one_process_scores_as_flambys_own_evaluation(
    heart: Path, in_one_process: tuple[list[Any], Any]
) -> None:
    flamby, (records, outcome) = package("fed_heart_disease"), in_one_process
    last = records[-1]
    assert list(last.by_silo) == [0, 1, 2, 3] and last.silos.samples == 254
    theirs = importlib.import_module("flamby.utils").evaluate_model_on_tests
    test = torch.utils.data.DataLoader(flamby.FedClass(train=False, pooled=True, data_path=str(heart)), 4)
    assert last.metrics.accuracy == theirs(outcome.model, [test], flamby.metric)["client_test_0"]
    assert last.metrics.accuracy > 0.6  # it learns


@needs_heart
def test_a_row_of_ours_and_the_same_name_of_fedmls_are_trained_on_flambys_loss(
    datasets: Path, heart: Path, tmp_path: Path
) -> None:
    package("fed_heart_disease")
    records, _ = run(heart_recipe(heart, federated_optimizer="FedAvg", model="flamby/baseline"), tmp_path)
    assert records[-1].metrics.accuracy > 0.6
    wrong = heart_recipe(heart, federated_optimizer="FedNova")
    assert any("FedNova' is FedML's own" in line for line in check(wrong))


@needs_heart
@pytest.mark.parametrize(("training", "backend"), [("cross_silo", "GRPC"), ("simulation", "MPI")])
def test_heart_over_processes_gives_the_figures_of_one(
    training: str, backend: str, heart: Path, in_one_process: tuple[list[Any], Any], tmp_path: Path
) -> None:
    records, _ = in_one_process
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe = heart_recipe(heart, training_type=training, backend=backend)
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "fedsq_plugin.cli", "launch", str(path), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(out / "metrics.csv")
    for split, part in (("test", "metrics"), ("silos", "silos")):
        expected = [list(getattr(record, part)[:2]) for record in records]
        assert found[found["split"] == split][["loss", "accuracy"]].values.tolist() == expected
    summary = json.loads((out / "summary.json").read_text())
    assert summary["metric"] == "accuracy"
    own = {str(silo): measured.accuracy for silo, measured in records[-1].by_silo.items()}
    assert summary["by_silo"]["FedSQ"]["0"] == own


@needs_heart
@pytest.mark.parametrize("rank", [0, 2])
def test_a_silos_process_loads_its_centre_alone(
    datasets: Path, heart: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from fedsq_plugin.hosts.fedml.hook import _load_ours

    flamby, made = package("fed_heart_disease"), []

    class Watched(flamby.FedClass):  # type: ignore[misc, name-defined]
        def __init__(self, **given: Any) -> None:
            made.append((given["center"], given["train"], given["pooled"]))
            super().__init__(**given)

    monkeypatch.setattr(flamby, "FedClass", Watched)
    road = {"training_type": "cross_silo", "backend": "GRPC"}
    values = {k: v for part in heart_recipe(heart, **road).values() for k, v in part.items()}
    data = _load_ours(SimpleNamespace(**values, rank=rank, worker_num=2))
    if rank:  # silos 1 and 3 of 4 belong to the second of two client processes
        assert sorted(made) == [(c, train, False) for c in (1, 3) for train in (False, True)]
        assert data.sizes == {1: 172, 3: 85} and data.global_test is None
    else:
        assert made == [(0, False, True)] and data.train == {} and len(data.global_test.dataset) == 254


def test_synthetic_data_of_flambys_own_script(datasets: Path, tmp_path: Path) -> None:
    package("fed_synthetic")
    script = datasets / "fed_synthetic" / "dataset_creation_scripts" / "download.py"
    options = ("--centers", "4", "--snr", "0.25", "--output-folder", str(tmp_path / "made"))
    subprocess.run([sys.executable, str(script), *options], check=True, timeout=LIMIT_S)
    # Without data_cache_dir: FLamby's own configuration names the folder.
    recipe = families("fed_synthetic", model="mlp", client_num_in_total=4, epochs=2)
    records, _ = run(recipe, tmp_path)
    assert records[-1].metrics.samples == 340 and records[-1].metrics.accuracy > 0.4
    recipe["train_args"].update(client_num_in_total=6, client_num_per_round=6)
    assert any("has 4 centres; set it to 4" in line for line in check(recipe))


STANDINS: dict[str, tuple[Callable[[Path, Path], None], bool, dict[str, Any]]] = {
    # what makes it, whether the recipe names its folder, the recipe
    "fed_isic2019": (standins.isic, True, {"model": "alexnet", "client_num_in_total": 6}),
    "fed_ixi": (standins.ixi, True, {"model": "flamby/baseline", "client_num_in_total": 3}),
    "fed_kits19": (
        standins.kits,
        False,
        # 31 million weights: two of the six sites train, and none tests by itself
        {**{"model": "flamby/baseline", "client_num_in_total": 6, "client_num_per_round": 2}, "silo_evaluation": False},
    ),
    "fed_camelyon16": (standins.camelyon, True, {"model": "flamby/baseline", "client_num_in_total": 2}),
    "fed_tcga_brca": (standins.tcga, False, {"model": "mlp", "client_num_in_total": 6}),
}


@pytest.mark.parametrize("name", STANDINS)
def test_a_round_on_stand_in_files(name: str, datasets: Path, plain_path: Path, tmp_path: Path) -> None:
    """Every shape, loss and metric is FLamby's; FedSQ trains, and its figure is the one of FLamby's own way
    to evaluate."""
    make, named, options = STANDINS[name]
    flamby = package(name)
    make(datasets, plain_path / "data")
    recipe = families(name, plain_path / "data" if named else "", **options)
    records, outcome = run(recipe, tmp_path)
    found = records[-1].metrics
    assert math.isfinite(found.loss) and 0 <= found.accuracy <= 1
    tested = options["client_num_in_total"] if options.get("silo_evaluation", True) else 0
    assert list(records[-1].by_silo) == list(range(tested))
    from fedsq_plugin.data.flamby.centres import load_centres

    utils = importlib.import_module("flamby.benchmarks.benchmark_utils")
    evaluate_func, test_batch, _ = utils.set_dataset_specific_config(name, use_gpu=False)
    place = {"data_path": str(plain_path / "data")} if named else {}
    common = {"dataset": functools.partial(flamby.FedClass, **place), "num_workers": 0}
    common |= {"batch_size": flamby.BATCH_SIZE, "batch_size_test": test_batch}
    common |= {"collate_fn": getattr(flamby, "collate_fn", None)}
    centres = options["client_num_in_total"]
    _, pooled = utils.init_data_loaders(pooled=True, **common)
    _, single = utils.init_data_loaders(pooled=False, num_clients=centres, **common)
    data = load_centres(config(recipe))
    for ours, theirs in ((data.global_test, pooled), (data.test[0], single[0])):
        with isolated(1):  # KiTS draws its patches at random: the same draws for both
            measured = evaluate(outcome.model, ours, "cpu", *data.task).accuracy
        with isolated(1):
            expected = evaluate_func(outcome.model, [theirs], flamby.metric, use_gpu=False)["client_test_0"]
        assert measured == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_baselines_without_gates_name_what_to_use(datasets: Path, heart: Path) -> None:
    package("fed_heart_disease")
    (line,) = check(heart_recipe(heart, model="flamby/baseline"))
    assert line == (
        "model_args.model flamby/baseline under FedSQ: FLamby's own for fed_heart_disease is a linear model, "
        "without a gate; use the model mlp"
    )
    assert check(heart_recipe(heart, model="flamby/baseline", federated_optimizer="FedAvg")) == []


def test_a_missing_folder_and_a_wrong_one_are_one_line(datasets: Path, tmp_path: Path) -> None:
    package("fed_heart_disease")
    (missing,) = check(heart_recipe(tmp_path / "nowhere"))
    assert missing.startswith(f"flamby/fed_heart_disease: no folder {tmp_path / 'nowhere'}; get them by: cd ")
    assert missing.endswith("python download.py --output-folder FOLDER")
    (wrong,) = check(heart_recipe(tmp_path))
    assert f"{tmp_path} holds no processed.*.data" in wrong
    (unset,) = check(heart_recipe(Path("")) | {"data_args": {"dataset": "flamby/fed_heart_disease"}})
    assert "the data are not there; get them by: cd " in unset and "data_args.data_cache_dir" in unset


def test_a_licence_that_nobody_accepted_is_one_line(datasets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package("fed_tcga_brca")
    marker = datasets / "fed_tcga_brca" / "dataset_creation_scripts" / "license_agreement_fed_tcga_brca"
    marker.unlink(missing_ok=True)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the plugin asked for the licence"))
    (line,) = check(families("fed_tcga_brca", model="mlp", client_num_in_total=6))
    assert line.endswith('python -c "from flamby.datasets.fed_tcga_brca import FedClass; FedClass()"')
    assert not marker.exists()


@needs_heart
def test_names_that_a_newer_dependency_lacks_are_one_line(
    datasets: Path, heart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package("fed_heart_disease")
    monkeypatch.delattr(np, "NaN")  # as numpy 2
    (line,) = check(heart_recipe(heart))
    assert "the data cannot be had (AttributeError: " in line and "NaN" in line
    assert "pip install 'fedsq-plugin[flamby]'" in line


def test_what_only_a_gpu_can_do_is_one_line(datasets: Path, tmp_path: Path) -> None:
    package("fed_lidc_idri")
    (line,) = check(families("fed_lidc_idri", tmp_path, model="flamby/baseline", client_num_in_total=4))
    assert "runs on a GPU only; under FedML, set device_args.using_gpu: true" in line
