"""Our data sets, without FedML: only its 8-tuple's form is assumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedsq_plugin.data.ours import _Batches, load
from PIL import Image

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.settings.config import Config


def config(**options: Any) -> Config:
    given = {
        "dataset": "digits",
        "model": "resnet18",
        "federated_optimizer": "FedSQ",
        "client_num_in_total": 4,
        "client_num_per_round": 4,
        "comm_round": 1,
        "partition_method": "homo",
    }
    return Config(**{**given, **options})


def images_of(loader: Any) -> set[bytes]:
    return {image.numpy().tobytes() for batch, _ in loader for image in batch}


def test_digits_come_in_fedmls_tuple() -> None:
    data, classes = load(config())
    # 1,797 images; 1797 // 4 = 449 are the test split.
    assert (classes, data[7]) == (10, 10)
    assert (data[0], data[1]) == (1348, 449)
    assert len(data[2].dataset) == 1348
    assert len(data[3].dataset) == 449
    assert sum(data[4].values()) == 1348
    assert sum(len(loader.dataset) for loader in data[6].values()) == 449
    images, labels = next(iter(data[5][0]))
    assert images.shape == (32, 3, 8, 8)
    assert labels.dtype == torch.int64


def test_silos_train_and_test_splits_are_disjoint_and_complete() -> None:
    data, _ = load(config(partition_method="hetero", partition_alpha=0.3))
    silos = [images_of(loader) for loader in data[5].values()]
    together: set[bytes] = set().union(*silos)
    assert sum(map(len, silos)) == len(together)
    assert together == images_of(data[2])
    assert not together & images_of(data[3])


def test_the_public_split_is_held_by_no_silo() -> None:
    data, _ = load(config(warm_start="public", warm_start_public=0.25))
    assert data.public is not None
    assert len(data.public.dataset) == 337  # a quarter of 1,348
    public = images_of(data.public)
    assert not public & images_of(data[2])
    assert not public & images_of(data[3])


def test_without_a_public_warm_start_nothing_is_held_back() -> None:
    assert load(config())[0].public is None


def test_counts_are_those_of_the_silos() -> None:
    data, _ = load(config(partition_method="hetero", partition_alpha=0.2))
    for silo, loader in data[5].items():
        labels = torch.cat([batch for _, batch in loader])
        assert torch.bincount(labels, minlength=10).tolist() == data.counts[silo]
        assert len(labels) == data[4][silo]


def test_every_silo_has_the_minimum() -> None:
    options = {"partition_method": "hetero", "partition_alpha": 0.1, "min_client_samples": 20}
    assert min(load(config(**options))[0][4].values()) >= 20


def test_the_data_seed_decides_the_split() -> None:
    first, again, other = (
        load(config(random_seed=r, data_seed=d))[0].counts for r, d in ((0, 1), (7, 1), (0, 2))
    )
    assert first == again != other


def test_a_silos_test_split_follows_its_training_split() -> None:
    data, _ = load(config(partition_method="hetero", partition_alpha=0.1))
    for silo, loader in data[6].items():
        labels = {int(label) for _, batch in loader for label in batch}
        assert labels <= {c for c, count in enumerate(data.counts[silo]) if count}


def test_digits_are_resized_where_asked() -> None:
    images, _ = next(iter(load(config(image_size=16))[0][3]))
    assert images.shape[-2:] == (16, 16)


@pytest.mark.parametrize(
    ("samples", "size", "expected"),
    [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (1, 4, [1]), (0, 4, []), (5, -1, [5]), (8, 4, [4, 4])],
)
def test_a_single_left_over_sample_joins_the_batch_before(
    samples: int, size: int, expected: list[int]
) -> None:
    batches = list(_Batches(samples, size, shuffle=True))
    assert [len(batch) for batch in batches] == expected
    assert sorted(index for batch in batches for index in batch) == list(range(samples))
    assert len(_Batches(samples, size, shuffle=True)) == len(expected)


def test_in_testing_a_single_left_over_sample_is_a_batch() -> None:
    assert list(_Batches(9, 4, shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_every_pass_is_announced() -> None:
    passes: list[int] = []
    batches = _Batches(4, 2, shuffle=False, begin=lambda: passes.append(len(passes)))
    assert passes == []
    for expected in ([0], [0, 1]):
        assert len(list(batches)) == 2
        assert passes == expected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 255, (10, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def from_folder(folder: Path, **options: Any) -> Any:
    given = {"dataset": "image_folder", "data_cache_dir": str(folder), "client_num_in_total": 2}
    return load(config(**{**given, "client_num_per_round": 2, **options}))


def test_image_folders_by_class(folder: Path) -> None:
    data, classes = from_folder(folder)
    assert classes == 2
    assert data.classes == ["cat", "dog"]
    assert (data[0], data[1]) == (12, 4)
    images, _ = next(iter(data[3]))
    assert images.shape == (4, 3, 10, 12)


def test_image_folders_are_normalised_as_imagenet(folder: Path) -> None:
    Image.new("RGB", (12, 10), (255, 0, 0)).save(folder / "test" / "cat" / "0.png")
    images, _ = next(iter(from_folder(folder)[0][3]))
    # red: (1 - .485) / .229, (0 - .456) / .224, (0 - .406) / .225
    assert images[0, :, 0, 0].tolist() == pytest.approx([2.2489, -2.0357, -1.8044], abs=1e-4)


def test_a_public_split_of_a_folder(folder: Path) -> None:
    data, _ = from_folder(folder, warm_start="public", warm_start_public=0.5)
    assert len(data.public.dataset) == 6
    assert data[0] == 6


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder .*train; data_cache_dir must hold"):
        from_folder(tmp_path)


def test_differing_classes_are_named(folder: Path) -> None:
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    with pytest.raises(ConfigError, match="the class dog is in only one of"):
        from_folder(folder)


def test_an_empty_class_is_named(folder: Path) -> None:
    (folder / "train" / "emu").mkdir()
    with pytest.raises(ConfigError, match="emu"):
        from_folder(folder)


def test_differing_sizes_need_image_size(folder: Path) -> None:
    Image.new("RGB", (5, 5)).save(folder / "train" / "cat" / "0.png")
    with pytest.raises(ConfigError, match=r"5x5 pixels and .*; set fedsq_args.image_size"):
        from_folder(folder)
    assert next(iter(from_folder(folder, image_size=9)[0][2]))[0].shape[-2:] == (9, 9)


def test_a_damaged_image_is_named(folder: Path) -> None:
    (folder / "test" / "cat" / "1.png").write_bytes(b"not an image")
    with pytest.raises(ConfigError, match=r"1\.png cannot be read as an image"):
        from_folder(folder)


def test_folders_beyond_the_memory_bound_are_decoded_as_they_come(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = from_folder(folder)[0]
    monkeypatch.setattr("fedsq_plugin.data.ours._MEMORY", 0)
    streamed = from_folder(folder)[0]
    for one, other in zip(kept[3], streamed[3], strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
