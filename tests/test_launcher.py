"""`python -m fedsq_plugin main.py --cf x.yaml`: FedML's own five lines, outside the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

MAIN = """\
import fedml
from fedml import FedMLRunner
if __name__ == "__main__":
    args = fedml.init(); device = fedml.device.get_device(args)
    dataset, output_dim = fedml.data.load(args)
    model = fedml.model.create(args, output_dim)
    FedMLRunner(args, device, dataset, model).run()
"""


def recipe(**changes: object) -> dict[str, dict[str, object]]:
    families: dict[str, dict[str, object]] = {
        "common_args": {"training_type": "simulation", "random_seed": 0},
        "data_args": {
            "dataset": "cinic10",
            "data_cache_dir": "./images",
            "partition_method": "homo",
            "partition_alpha": 0.5,
        },
        "model_args": {"model": "resnet18"},
        "train_args": {
            "federated_optimizer": "FedSQ",
            "client_id_list": "[]",
            "client_num_in_total": 2,
            "client_num_per_round": 2,
            "comm_round": 2,
            "epochs": 1,
            "batch_size": 8,
            "client_optimizer": "sgd",
            "learning_rate": 0.01,
            "weight_decay": 0.001,
        },
        "validation_args": {"frequency_of_the_test": 1},
        "device_args": {"using_gpu": False, "gpu_id": 0},
        "comm_args": {"backend": "sp"},
        "tracking_args": {"enable_wandb": False},
    }
    for options in families.values():
        options.update({key: value for key, value in changes.items() if key in options})
    return families


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: main.py, and images in CINIC-10's layout for FedML's own loader."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 8)):
        for label, name in enumerate(("airplane", "bird")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 128, (32, 32, 3), dtype=np.uint8) + np.uint8(100 * label)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number}.png")
    (tmp_path / "main.py").write_text(MAIN)
    return tmp_path


def launch(folder: Path, families: object, *more: str) -> subprocess.CompletedProcess[str]:
    (folder / "x.yaml").write_text(yaml.safe_dump(families))
    command = [sys.executable, "-m", "fedsq_plugin", "main.py", "--cf", "x.yaml", *more]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_an_unchanged_main_runs_fedsq_on_fedmls_own_data_set(folder: Path) -> None:
    done = launch(folder, recipe())
    assert done.returncode == 0, done.stderr[-2000:]
    assert "FedSQ round 2/2: test accuracy" in done.stderr


def test_rows_joined_by_a_plus_run_and_test_every_silos_own_model(folder: Path) -> None:
    done = launch(folder, recipe(federated_optimizer="FedSQ+FedBN", comm_round=1))
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"FedSQ\+FedBN round 1/1: test accuracy \d.*, silos \d", done.stderr)


def test_rows_that_do_not_go_together_end_with_one_line(folder: Path) -> None:
    done = launch(folder, recipe(federated_optimizer="FedRep+FedBN"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "fedsq: error: FedRep and FedBN do not go together: both choose exchange (body only; without norm layers)"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("weight_decay", [0.0, 0.001])
def test_fedmls_own_optimizer_runs_under_the_launcher(folder: Path, weight_decay: float) -> None:
    done = launch(folder, recipe(federated_optimizer="FedAvg", comm_round=1, weight_decay=weight_decay))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "local_test_on_all_clients" in done.stderr  # FedML's loop, not ours
    # It is FedML's alone, but for the way out where this loop ignores an option.
    said = [line for line in done.stderr.splitlines() if "fedsq" in line.lower().replace("fedsq_plugin", "")]
    assert len(said) == (1 if weight_decay else 0), said
    assert all("own_algorithms: true" in line for line in said)
    assert ("train_args.weight_decay has no effect: FedML's own FedAvg" in done.stderr) == bool(weight_decay)


def test_a_home_that_cannot_be_written_ends_with_one_line(tmp_path: Path) -> None:
    """FedML writes there as it is imported."""
    (tmp_path / "main.py").write_text(MAIN)
    home = tmp_path / "main.py" / "home"
    command = [sys.executable, "-m", "fedsq_plugin", "main.py", "--cf", "x.yaml"]
    environment = {**os.environ, "HOME": str(home)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == (
        f"fedsq: error: HOME {home} cannot be written (Not a directory), and FedML keeps its files under "
        "~/.fedml: set HOME to a writable folder\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["main.py"]


def test_a_missing_recipe_ends_with_one_line(folder: Path) -> None:
    (folder / "x.yaml").unlink(missing_ok=True)
    command = [sys.executable, "-m", "fedsq_plugin", "main.py", "--cf", "missing.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fedsq: error: recipe missing.yaml: No such file")
    assert "Traceback" not in done.stderr


def test_a_missing_script_ends_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedsq_plugin", "none.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "fedsq: error: no script none.py\n")
