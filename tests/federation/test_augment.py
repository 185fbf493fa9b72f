"""Augmentation against a loop over images and pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsq_plugin.errors import ConfigError
from fedsq_plugin.federation.augment import AUGMENTATIONS, augment, crop, flip
from fedsq_plugin.federation.seeding import isolated


def images(count: int, height: int, width: int) -> Tensor:
    """Every pixel of every image and channel has its own value."""
    return torch.arange(count * 2 * height * width, dtype=torch.float32).view(count, 2, height, width)


def reflected(position: int, size: int) -> int:
    """Mirror at the first and last pixel, which are not repeated."""
    if position < 0:
        return -position
    return 2 * (size - 1) - position if position >= size else position


def naive_crop(batch: Tensor, rows: Tensor, columns: Tensor, top: int, left: int) -> Tensor:
    """Pixel (i, j) is the one at (i + row - top, j + column - left), reflected into the image."""
    count, _, height, width = batch.shape
    result = torch.empty_like(batch)
    for n in range(count):
        for i in range(height):
            for j in range(width):
                source = (reflected(i + int(rows[n]) - top, height), reflected(j + int(columns[n]) - left, width))
                result[n, :, i, j] = batch[n, :, source[0], source[1]]
    return result


@pytest.mark.parametrize(
    ("height", "width", "top", "left"),
    [
        (8, 8, 1, 1),
        (5, 6, 1, 1),  # an eighth is less than a pixel: one pixel
        (16, 24, 2, 3),
        (2, 2, 1, 1),
    ],
)
def test_crop_equals_a_loop_over_pixels(height: int, width: int, top: int, left: int) -> None:
    batch = images(6, height, width)
    with isolated(3):
        found = crop(batch)
    with isolated(3):
        rows, columns = (torch.randint(2 * border + 1, (6, 1, 1)) for border in (top, left))
    assert torch.equal(found, naive_crop(batch, rows, columns, top, left))


def test_crop_by_one_pixel_by_hand() -> None:
    # One row [1 2 3], twice; by the border of one pixel the row is [2 | 1 2 3 | 2].
    batch = torch.tensor([[1.0, 2.0, 3.0]] * 2).view(1, 1, 2, 3)
    shifted = {(2.0, 1.0, 2.0), (1.0, 2.0, 3.0), (2.0, 3.0, 2.0)}
    found = set()
    for seed in range(30):
        with isolated(seed):
            found.add(tuple(crop(batch)[0, 0, 0].tolist()))
    assert found == shifted


def test_every_image_of_a_crop_is_moved_on_its_own() -> None:
    with isolated(0):
        found = crop(images(1, 8, 8).expand(32, -1, -1, -1))
    assert len({image.numpy().tobytes() for image in found}) > 4


def test_flip_by_hand() -> None:
    batch = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]]).expand(64, -1, -1, -1)
    with isolated(0):
        found = flip(batch)
    with isolated(0):
        chosen = (torch.rand(64) < 0.5).tolist()
    plain, mirrored = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[3.0, 2.0, 1.0], [6.0, 5.0, 4.0]]
    assert [image[0].tolist() for image in found] == [mirrored if c else plain for c in chosen]


def test_flip_takes_about_half_of_the_images() -> None:
    # 1,000 draws: mean 500, deviation sqrt(1000)/2 = 15.8; five deviations either way.
    batch = torch.tensor([[[[0.0, 1.0]]]]).expand(1000, -1, -1, -1)
    with isolated(0):
        assert abs(int(flip(batch)[:, 0, 0, 0].sum()) - 500) < 80


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (5, 1, 2, 9), (3, 2, 32, 16), (0, 3, 8, 8)])
def test_shape_and_dtype_are_kept(name: str, shape: tuple[int, ...]) -> None:
    found = AUGMENTATIONS[name](torch.zeros(shape, dtype=torch.float64))
    assert (tuple(found.shape), found.dtype) == (shape, torch.float64)


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_the_given_images_are_not_written_to(name: str) -> None:
    batch = images(4, 8, 8)
    before = batch.clone()
    AUGMENTATIONS[name](batch)
    assert torch.equal(batch, before)


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_draws_depend_on_the_seed_alone(name: str) -> None:
    found = []
    for outside in (1, 2):
        torch.manual_seed(outside)
        with isolated(5):
            found.append(augment(images(8, 8, 8), [name]))
    assert torch.equal(*found)


def test_augment_without_names_changes_nothing() -> None:
    batch = images(2, 8, 8)
    assert augment(batch, ()) is batch


def test_augment_applies_the_names_in_order() -> None:
    batch = images(8, 8, 8)
    with isolated(1):
        found = augment(batch, ("flip", "crop"))
    with isolated(1):
        expected = crop(flip(batch))
    assert torch.equal(found, expected)


def test_inputs_that_are_no_images_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"not for inputs of shape \(4, 784\)"):
        augment(torch.zeros(4, 784), ["flip"])
