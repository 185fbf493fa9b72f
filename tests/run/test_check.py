"""What `fedsq check` finds: everything that `fedsq run` would end with, without running it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fedsq_plugin import models
from fedsq_plugin.errors import WeightsError, worded
from fedsq_plugin.hosts.fedml.names import FEDML_MODELS, NO_COLOUR_IMAGES, OTHER_LOSSES
from fedsq_plugin.run.check import check, notes
from fedsq_plugin.run.facts import facts_of
from fedsq_plugin.run.plan import RECIPE
from fedsq_plugin.settings.config import OPTIONS, family_of
from fedsq_plugin.settings.idle import untrained_gates
from fedsq_plugin.settings.recipe import Families

BASE = {
    **{"dataset": "digits", "model": "resnet18", "federated_optimizer": "FedSQ", "small_images": True},
    **{"client_num_in_total": 4, "client_num_per_round": 4, "comm_round": 2, "batch_size": 32},
}


def recipe(**options: Any) -> Families:
    families: Families = {}
    for key, value in {**BASE, **options}.items():
        families.setdefault(family_of(key) if key in OPTIONS else "other_args", {})[key] = value
    return families


def only(**options: Any) -> str:
    """The one thing that is wrong."""
    (line,) = check(recipe(**options))
    assert len(line.splitlines()) == 1
    return line


def folder(root: Path, sizes: tuple[int, ...] = (8,)) -> Path:
    for split, count in (("train", 8), ("test", 4)):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                side = sizes[number % len(sizes)]
                image = Image.fromarray(np.full((side, side, 3), number, dtype=np.uint8))
                image.save(root / split / label / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"federated_optimizer": "FedBN", "model": "alexnet", "image_size": 64}, "the model has none"),
        ({"federated_optimizer": "FedRep", "model": "resnet56"}, "set fedsq_args.head, resnet56's last"),
        (
            {"federated_optimizer": "FrozenEarly", "frozen_modules": ["nope"]},
            "fedsq_args.frozen_modules: the model has no 'nope'",
        ),
        ({"federated_optimizer": "FedSQ+FedMRR"}, "unknown algorithm 'FedMRR' in 'FedSQ+FedMRR'; did"),
        ({"federated_optimizer": "FedRep+FedBABU"}, "both choose phases"),
        ({"model": "gelunet"}, "set warm_start_args.relu_ise: true"),
        ({"relu_ise": True}, "no nn.GELU, nn.SiLU or nn.Hardswish"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_method_cannot_have_is_found_without_training(options: dict[str, Any], said: str) -> None:
    assert said in only(**options)


def test_a_good_recipe_has_nothing_wrong() -> None:
    assert check(recipe()) == []
    assert notes(recipe()) == []


def test_checks_of_other_options_go_on_beside_a_wrong_one() -> None:
    found = check(recipe(comm_round="x", head="nope", min_client_samples=1000, model="alexnet",
                         small_images=False, client_num_per_round=9, enable_wandb=True))  # fmt: skip
    for expected in (
        "train_args.comm_round is 'x'",
        "client_num_per_round is 9, more than",
        "fedsq_args.head 'nope' is no module of the model",
        "cannot give 4 silos 1000 each",
        "model_args.model alexnet does not run on 8x8 images of digits",
        "tracking_args.wandb_project is missing",
    ):
        assert sum(line.startswith(expected) or expected in line for line in found) == 1, (expected, found)
    assert len(found) == 6


@pytest.mark.parametrize("key", sorted(OPTIONS))
@pytest.mark.parametrize("value", [["a"], {"a": 1}, None, 7], ids=str)
def test_a_value_of_any_kind_is_no_crash(key: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsq_plugin.run.check._trial", lambda valid: [])  # seconds each
    check(recipe(**{key: value}))
    notes(recipe(**{key: value}))


@pytest.mark.parametrize("key", ["dataset", "model", "federated_optimizer", "data_cache_dir", "warm_start"])
def test_a_list_for_a_name_is_one_line(key: str) -> None:
    assert f".{key} is ['a']: input should be" in only(**{key: ["a"]})


def test_families_of_nothing_are_no_crash() -> None:
    assert any("is missing" in line for line in check({"train_args": {}}))
    assert notes({}) == []


# Warm start


def test_imagenet_for_small_images() -> None:
    assert "set fedsq_args.small_images: false" in only(warm_start="imagenet")


def test_imagenet_for_a_model_that_is_fedmls() -> None:
    line = only(warm_start="imagenet", model="resnet56", small_images=False)
    assert "no such weights for resnet56; use alexnet, resnet18" in line


def test_imagenet_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = "torchvision.models._api.load_state_dict_from_url"
    monkeypatch.setattr(fetch, lambda *_, **__: pytest.fail("fetched"))
    assert check(recipe(warm_start="imagenet", small_images=False)) == []


def test_public_of_a_data_set_without() -> None:
    line = only(warm_start="public", dataset="cifar10", data_cache_dir="x", partition_method="homo",
                partition_alpha=0.5)  # fmt: skip
    assert "cifar10 has no public split" in line


@pytest.mark.parametrize(("share", "left"), [(0.0001, 0), (0.0008, 1)])
def test_a_public_split_that_is_too_small(share: float, left: int) -> None:
    line = only(warm_start="public", warm_start_public=share)
    assert line.startswith(f"warm_start_args.warm_start_public {share} leaves {left} of the training samples")


@pytest.mark.parametrize("model", ["resnet18", "resnet56"])
def test_a_damaged_weights_file(model: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(b"nothing like it")
    line = only(warm_start="file", warm_start_file=str(path), model=model)
    assert str(path) in line


def test_weights_of_another_stem_advise_the_recipes_key(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    save_file(models.create("resnet18", 10).state_dict(), path)
    line = only(warm_start="file", warm_start_file=str(path))
    assert line.startswith(f"warm start from {path}: the file's tensors do not fit")
    assert line.endswith("this file needs fedsq_args.small_images: false")


def test_weights_for_other_channels_name_no_option_that_recipes_lack(tmp_path: Path) -> None:
    path = tmp_path / "grey.safetensors"
    save_file(models.create("resnet18", 10, small_images=True, in_channels=1).state_dict(), path)
    line = only(warm_start="file", warm_start_file=str(path))
    assert line.endswith("this file needs images of another number of channels: 1")
    save_file(models.create("resnet18", 10, in_channels=1).state_dict(), path)
    line = only(warm_start="file", warm_start_file=str(path))
    assert line.endswith("fedsq_args.small_images: false and images of another number of channels: 1")


@pytest.mark.parametrize("weights", ["imagenet", "none.pt"])
def test_weights_that_cannot_be_had_advise_the_recipes_keys(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(WeightsError, match="warm_start_file") as caught, worded(RECIPE):
        models.pretrained_state(weights, "resnet18")
    assert "as weights" not in str(caught.value)
    assert "give 'imagenet'" not in str(caught.value)


@pytest.mark.parametrize("model", ["resnet18", "dualcopy_resnet18"])
def test_weights_that_fit_but_for_the_head(model: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(models.create("resnet18", 5, small_images=True).state_dict(), path)
    assert check(recipe(warm_start="file", warm_start_file=str(path), model=model)) == []


def test_weights_for_an_unknown_head_advise_the_recipes_key(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(models.create("resnet18", 10, small_images=True).state_dict(), path)
    found = check(recipe(warm_start="file", warm_start_file=str(path), head="nope"))
    assert any("fedsq_args.head: the model has no module 'nope'" in line for line in found)


# Model and data


def test_a_model_too_deep_for_the_images() -> None:
    line = only(model="alexnet", small_images=False)
    assert line.startswith("model_args.model alexnet does not run on 8x8 images of digits")
    assert line.endswith("set fedsq_args.small_images: true, or a larger fedsq_args.image_size")


def test_resized_images_are_what_the_model_is_tried_with() -> None:
    assert check(recipe(model="alexnet", small_images=False, image_size=64)) == []


def test_batches_of_one_under_batch_normalisation() -> None:
    assert only(batch_size=1).endswith("raise train_args.batch_size")


def test_batches_of_one_without_batch_normalisation() -> None:
    assert check(recipe(batch_size=1, model="alexnet")) == []


def test_a_silo_of_one_sample_under_batch_normalisation() -> None:
    line = only(client_num_in_total=300, min_client_samples=0)
    assert line.endswith("raise fedsq_args.min_client_samples to 2")


def test_all_data_at_once_is_tried_with_a_small_batch() -> None:
    assert check(recipe(batch_size=-1)) == []


def test_silos_too_large_for_the_partition() -> None:
    assert "lower client_num_in_total or min_client_samples" in only(min_client_samples=1000)


def test_a_dualcopy_under_a_plain_algorithm() -> None:
    assert "use the plain model" in only(model="dualcopy_resnet18", federated_optimizer="FedAvg")


def test_folders_of_images_are_read(tmp_path: Path) -> None:
    options = {"dataset": "image_folder", "data_cache_dir": str(tmp_path), "partition_method": "homo"}
    assert len(check(recipe(**options))) == 2  # no folder train, no folder test
    folder(tmp_path)
    assert check(recipe(**options)) == []
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"no image")
    assert "cannot be read as an image" in only(**options)


def test_images_of_several_sizes(tmp_path: Path) -> None:
    options = {"dataset": "image_folder", "data_cache_dir": str(folder(tmp_path, sizes=(8, 12)))}
    assert "set fedsq_args.image_size" in only(**options, partition_method="homo")


def test_image_folder_without_a_folder() -> None:
    assert only(dataset="image_folder").startswith("data_args.data_cache_dir is missing")


# What is known of FedML by name

CIFAR10 = {"dataset": "cifar10", "data_cache_dir": "x", "partition_method": "homo", "partition_alpha": 0.5}


def test_a_model_that_fedml_has_for_other_data_sets() -> None:
    line = only(model="lr", federated_optimizer="FedAvg")
    assert line == "model_args.model lr is FedML's for mnist, cifar10, stackoverflow_lr, not for digits"


def test_a_model_without_a_gate() -> None:
    assert "lr has no ReLU-like activation that FedSQ could gate" in only(**CIFAR10, model="lr")


def test_our_model_on_data_that_are_no_colour_images() -> None:
    line = only(**{**CIFAR10, "dataset": "mnist"})
    assert line == "model_args.model resnet18 takes images of three channels, mnist has none"


def test_options_that_fedmls_loaders_cannot_do_without() -> None:
    found = check(recipe(dataset="cifar10"))
    assert [line.split(" ")[0] for line in found] == [
        "data_args.data_cache_dir",
        "data_args.partition_method",
        "data_args.partition_alpha",
    ]


def test_fedmls_own_models_and_data_sets_pass() -> None:
    assert check(recipe(**CIFAR10, model="resnet56")) == []


def test_more_silos_per_round_than_the_recipe_says_where_fedml_sets_the_number() -> None:
    options = {**CIFAR10, "dataset": "femnist", "model": "cnn", "client_num_per_round": 10}
    assert check(recipe(**options)) == []


def test_fedmls_own_optimizer_is_sent_to_the_launcher() -> None:
    assert "is FedML's own: run it by `python -m fedsq_plugin main.py`" in only(federated_optimizer="FedNova")


def test_wandb_with_a_project() -> None:
    assert check(recipe(enable_wandb=True, wandb_project="p")) == []


def test_a_gpu_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU; run on one without to see the refusal")
    assert only(using_gpu=True).startswith("device_args.using_gpu is true, but no GPU")


def test_homomorphic_encryption() -> None:
    assert only(enable_fhe=True).startswith("enable_fhe is true")


def test_names_of_fedml_are_fedmls(fedml_sources: str) -> None:
    """The tables in names.py against FedML's source."""
    for model, homes in FEDML_MODELS.items():
        assert f'model_name == "{model}"' in fedml_sources
        for dataset in homes:
            assert f'model_name == "{model}" and args.dataset == "{dataset}"' in fedml_sources
    assert set(OTHER_LOSSES) <= set(NO_COLOUR_IMAGES)


@pytest.fixture
def fedml_sources() -> str:
    import importlib.util

    spec = importlib.util.find_spec("fedml")
    assert spec and spec.origin
    return (Path(spec.origin).parent / "model" / "model_hub.py").read_text()


# What would silently do nothing


@pytest.mark.parametrize(
    ("options", "key", "why"),
    [
        ({"federated_optimizer": "FedAvg", "keep_gates": True}, "keep_gates", "plain model"),
        ({"federated_optimizer": "FedProx", "gate_accept": ["a"]}, "gate_accept", "plain model"),
        ({"federated_optimizer": "FedAvg", "gate_pooling": "own"}, "gate_pooling", "plain model"),
        ({"model": "resnet56"}, "small_images", "none of our models"),
        ({**CIFAR10, "data_seed": 1}, "data_seed", "FedML's own data set"),
        ({**CIFAR10, "image_size": 32}, "image_size", "FedML's own data set"),
        ({**CIFAR10, "min_client_samples": 5}, "min_client_samples", "FedML's own data set"),
        ({"client_optimizer": "adam", "momentum": 0.9}, "momentum", "adam has none"),
        ({"fedprox_mu": 1}, "fedprox_mu", "FedSQ does not read it"),
        ({"warm_start_epochs": 3}, "warm_start_epochs", "warm_start is 'none'"),
        ({"warm_start": "imagenet", "warm_start_public": 0.5}, "warm_start_public", "'imagenet'"),
        ({"lr_schedule": "cosine", "lr_decay": 0.5}, "lr_decay", "'cosine'"),
        ({"federated_optimizer": "FedNova", "clip_norm": 1}, "clip_norm", "FedNova runs the rounds"),
        ({"federated_optimizer": "FedNova", "augmentation": ["flip"]}, "augmentation", "FedNova trains"),
        ({"federated_optimizer": "HierarchicalFL", "momentum": 0.9}, "momentum", "trains by plain SGD"),
        ({"extra": {"a": 1}}, "extra", "FedSQ does not read it"),
        ({"finetune_part": "head"}, "finetune_part", "no final fine-tuning"),
        ({"structural_copy": "refresh", "structural_rounds": 99}, "structural_copy", "ends after"),
        ({"server_lr": 0.5}, "server_lr", "FedSQ does not read it"),
        ({"relu_ise_tolerance": 0.1}, "relu_ise_tolerance", "relu_ise is false"),
    ],
)
def test_an_option_without_effect_is_a_note(options: dict[str, Any], key: str, why: str) -> None:
    (line,) = notes(recipe(**options))
    assert line.startswith(f"{family_of(key)}.{key} has no effect: ")
    assert why in line


@pytest.mark.parametrize("name", ["FedAvg", "FedProx"])
def test_what_fedmls_loop_of_that_name_ignores_in_a_script_is_a_note_each(name: str) -> None:
    """`fedsq run` runs ours, which read it."""
    ignored = {"momentum": 0.9, "weight_decay": 0.1, "lr_schedule": "cosine", "nesterov": True}
    found = notes(recipe(federated_optimizer=name, **ignored))
    assert len(found) == 4
    for key in ignored:
        (line,) = [line for line in found if f".{key} " in line]
        assert line.startswith(f"in a script of your own, {family_of(key)}.{key} has no effect: FedML's own {name} ")
        assert line.endswith(f"; fedsq_args.own_algorithms: true runs the plugin's {name} there, too")
    for asked in ({"own_algorithms": True}, {"federated_optimizer": "FedSQ"}, {"backend": "MPI"}):
        others = notes(recipe(**{"federated_optimizer": name, **ignored, **asked}))
        assert len(others) == (4 if "backend" in asked else 0)


def test_what_one_of_fedmls_algorithms_reads_is_no_note() -> None:
    """FedML's FedNova hands momentum to its optimizer, unlike the others."""
    assert notes(recipe(federated_optimizer="FedNova", momentum=0.9)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"keep_gates": True, "gate_pooling": "own"},
        {"model": "dualcopy_resnet18", "gate_pooling": "own", "federated_optimizer": "FedNova"},
        {"federated_optimizer": "FedProx", "fedprox_mu": 1},
        {"warm_start": "public", "warm_start_epochs": 3},
        {"lr_schedule": "step", "lr_decay": 0.5},
        {"data_seed": 1, "image_size": 16, "min_client_samples": 5},
        {"momentum": 0.9, "nesterov": True},
        {"warm_start": "sideways", "warm_start_epochs": 3},
    ],
)
def test_an_option_with_an_effect_is_no_note(options: dict[str, Any]) -> None:
    assert notes(recipe(**options)) == []


def test_fedml_is_not_imported() -> None:
    code = (
        "import sys\n"
        "from fedsq_plugin.run.check import check, notes\n"
        "from fedsq_plugin.settings.recipe import read_yaml\n"
        "families = read_yaml('recipes/quickstart.yaml')\n"
        "assert check(families) == notes(families) == []\n"
        "assert 'fedml' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=120)


def test_gates_of_random_weights_are_a_note() -> None:
    def noted(**options: str) -> list[str]:
        valid = {"model": "resnet18", "federated_optimizer": "FedSQ", **options}
        return untrained_gates(valid, facts_of(valid))

    assert len(noted()) == 1
    assert noted(warm_start="public") == []
    assert noted(federated_optimizer="FedAvg") == []
    assert noted(model="resnet56") == []  # a script's own weights are its business


def test_a_model_of_flambys_on_other_data_hides_nothing_else() -> None:
    families = {
        "data_args": {"dataset": "digits"},
        "model_args": {"model": "flamby/baseline"},
        "train_args": {
            **{"federated_optimizer": "FedAvg", "client_num_in_total": 2, "client_num_per_round": 2},
            **{"comm_round": 1, "learning_rat": 0.1},
        },
    }
    lines = check(families)
    assert any("is made for one of FLamby's data sets" in line for line in lines)
    assert any("learning_rat" in line for line in lines)


def on_cifar(**options: Any) -> Families:
    """A recipe for a data set that FedML's own loader divides."""
    return recipe(**{"dataset": "cifar10", "data_cache_dir": "none", "partition_alpha": 0.5, **options})


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("dirichlet", "is unknown; known: hetero, hetero-fix, homo (FedML's loader of cifar10 takes homo, hetero, het"),
        ("homogen", "is unknown; did you mean 'homo'? (FedML's loader of cifar10 takes homo, hetero, hetero-fix)"),
    ],
)
def test_a_partition_method_that_fedmls_loader_does_not_take(method: str, line: str) -> None:
    (found,) = check(on_cifar(partition_method=method))
    assert found.startswith(f"data_args.partition_method '{method}' {line}")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "cinic10"])
@pytest.mark.parametrize("method", ["homo", "hetero"])
def test_the_partition_methods_of_fedmls_loaders_are_fine(dataset: str, method: str) -> None:
    assert check(on_cifar(dataset=dataset, partition_method=method)) == []


def test_a_fixed_partition_of_fedmls_needs_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("data_preprocessing/non-iid-distribution/CIFAR10")
    (line,) = check(on_cifar(partition_method="hetero-fix"))
    assert line.startswith(f"data_args.partition_method hetero-fix: FedML reads {folder}/net_dataidx_map.txt")
    folder.mkdir(parents=True)
    for name in ("net_dataidx_map.txt", "distribution.txt"):
        (folder / name).touch()
    assert check(on_cifar(partition_method="hetero-fix")) == []


def test_a_partition_method_has_no_effect_on_data_that_come_divided() -> None:
    found = recipe(dataset="femnist", data_cache_dir="none", partition_method="homo", model="cnn")
    assert "data_args.partition_method has no effect: femnist comes divided over silos" in notes(found)


def test_a_misspelt_key_of_fedmls_families_is_a_note() -> None:
    found = recipe()
    found["train_args"]["learning_rat"] = 0.1
    assert check(found) == []
    assert "train_args.learning_rat looks like a misspelling of 'learning_rate'" in notes(found)
