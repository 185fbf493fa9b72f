"""Folders of images by class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedsq_plugin.data.registry import load
from fedsq_plugin.data.silos import SilosData
from fedsq_plugin.errors import ConfigError

from .recipes import config


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


def from_folder(folder: Path, **options: Any) -> SilosData:
    given = {"dataset": "image_folder", "data_cache_dir": str(folder), "client_num_in_total": 2}
    return load(config(**{**given, "client_num_per_round": 2, **options}))


def test_image_folders_by_class(folder: Path) -> None:
    data = from_folder(folder)
    assert data.outputs == 2
    assert data.classes == ["cat", "dog"]
    assert (sum(data.sizes.values()), data.global_test_size) == (12, 4)
    images, _ = next(iter(data.global_test))
    assert images.shape == (4, 3, 10, 12)


def test_image_folders_are_normalised_as_imagenet(folder: Path) -> None:
    Image.new("RGB", (12, 10), (255, 0, 0)).save(folder / "test" / "cat" / "0.png")
    images, _ = next(iter(from_folder(folder).global_test))
    # red: (1 - .485) / .229, (0 - .456) / .224, (0 - .406) / .225
    assert images[0, :, 0, 0].tolist() == pytest.approx([2.2489, -2.0357, -1.8044], abs=1e-4)


def test_a_public_split_of_a_folder(folder: Path) -> None:
    data = from_folder(folder, warm_start="public", warm_start_public=0.5)
    assert len(data.public.dataset) == 6
    assert sum(data.sizes.values()) == 6


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
    assert next(iter(from_folder(folder, image_size=9).global_train))[0].shape[-2:] == (9, 9)


def test_a_damaged_image_is_named(folder: Path) -> None:
    (folder / "test" / "cat" / "1.png").write_bytes(b"not an image")
    with pytest.raises(ConfigError, match=r"1\.png cannot be read as an image"):
        from_folder(folder)


def test_folders_beyond_the_memory_bound_are_decoded_as_they_come(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = from_folder(folder)
    monkeypatch.setattr("fedsq_plugin.data.image_folder.MEMORY", 0)
    streamed = from_folder(folder)
    for one, other in zip(kept.global_test, streamed.global_test, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
