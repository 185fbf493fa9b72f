"""Pictures of every mode: scaled to [0, 1] by the range of the mode, or refused by file and mode."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from fedsq_plugin.data.images import read_header, read_image
from fedsq_plugin.data.registry import load
from fedsq_plugin.errors import ConfigError

from .recipes import config

ORIENTATION = 274


def channels(path: Path) -> list[Any]:
    """The first pixel's red, green and blue, from 0 to 1."""
    image = read_image(str(path))
    if image.mode == "F":
        return [float(image.getpixel((0, 0)))] * 3
    assert image.mode == "RGB"
    return [level / 255 for level in image.getpixel((0, 0))]


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_image(str(path))
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and str(path) in line
    return line


def png(path: Path, depth: int, colour: int, pixel: bytes) -> Path:
    """A picture of one pixel, written by the format's own rules (PIL writes no 48-bit colours)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, depth, colour, 0, 0, 0)
    whole = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + pixel)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + whole)
    return path


def tiff(path: Path, levels: Any, **tags: int) -> Path:
    """A picture of one strip, with these tags, by the format's own rules."""
    names = {"bits": 258, "photometric": 262, "signed": 339}
    data = np.asarray(levels)
    height, width = data.shape
    found = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 277: 1, 278: height, 279: data.nbytes, 339: 1}
    found |= {names[name]: value for name, value in tags.items()}
    offset = 8 + 2 + 12 * (len(found) + 1) + 4
    entries = sorted({**found, 273: offset}.items())
    body = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in entries)
    path.write_bytes(b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + b"\0" * 4 + data.tobytes())
    return path


def saved(path: Path, levels: Any, mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(np.asarray(levels))
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


DEEP = np.array([[13107, 65535], [0, 39321]], dtype=np.uint16)
"""13107 = 65535 / 5."""


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_by_65535(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"x.{suffix}", DEEP)
    image = read_image(str(path))
    assert np.asarray(image).ravel().tolist() == pytest.approx([0.2, 1, 0, 0.6])


def test_sixteen_bits_with_the_high_byte_first(tmp_path: Path) -> None:
    image = Image.frombytes("I;16B", (2, 2), DEEP.astype(">u2").tobytes())
    image.save(tmp_path / "x.tif")
    assert channels(tmp_path / "x.tif") == pytest.approx([0.2] * 3)


def test_sixteen_bits_that_pil_calls_thirty_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PIL did up to version 11: the file's bit depth decides."""
    path = saved(tmp_path / "x.png", DEEP)
    opened = Image.open

    def older(file: Any) -> Any:
        image = opened(file)
        image.load()
        deep = image.convert("I")
        deep.format = image.format
        return deep

    monkeypatch.setattr(Image, "open", older)
    assert channels(path) == pytest.approx([0.2] * 3)


def test_twelve_bits_of_a_tiff_are_scaled_by_4095(tmp_path: Path) -> None:
    # Two levels of 12 bits in three bytes: 819 = 0x333 = 4095 / 5, and 0.
    path = tiff(tmp_path / "x.tif", np.array([[0x33, 0x30, 0x00]], dtype=np.uint8), bits=12)
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<HHII", 256, 3, 1, 3))
    content[at : at + 12] = struct.pack("<HHII", 256, 3, 1, 2)
    path.write_bytes(content)
    assert channels(path) == pytest.approx([0.2] * 3)


def test_sixteen_bits_of_which_zero_is_white(tmp_path: Path) -> None:
    assert channels(tiff(tmp_path / "x.tif", DEEP, photometric=0)) == pytest.approx([0.8] * 3)
    assert channels(tiff(tmp_path / "y.tif", DEEP)) == pytest.approx([0.2] * 3)


@pytest.mark.parametrize(
    ("colour", "pixel", "right"),
    [
        (2, struct.pack(">3H", 13107, 65535, 0), [0.2, 1, 0]),
        (4, struct.pack(">2H", 13107, 65535), [0.2] * 3),
        (6, struct.pack(">4H", 13107, 65535, 0, 65535), [0.2, 1, 0]),
    ],
)
def test_colours_of_sixteen_bits_are_those_of_eight(tmp_path: Path, colour: int, pixel: bytes, right: Any) -> None:
    # PIL reads the high bytes: 13107 = 0x3333, and 0x33 / 0xff is 0.2.
    assert channels(png(tmp_path / "x.png", 16, colour, pixel)) == pytest.approx(right)


@pytest.mark.parametrize(
    ("make", "right"),
    [
        (lambda path: Image.new("1", (2, 2), 1).save(path), [1, 1, 1]),
        (lambda path: Image.new("L", (2, 2), 51).save(path), [0.2] * 3),
        (lambda path: Image.new("RGB", (2, 2), (51, 255, 0)).save(path), [0.2, 1, 0]),
        (lambda path: Image.new("RGB", (2, 2), (51, 255, 0)).quantize(4).save(path), [0.2, 1, 0]),
        (lambda path: Image.new("LA", (2, 2), (51, 255)).save(path), [0.2] * 3),
        (lambda path: Image.new("RGBA", (2, 2), (51, 255, 0, 255)).save(path), [0.2, 1, 0]),
        (lambda path: png(path, 2, 0, b"\x40"), [1 / 3] * 3),
        (lambda path: png(path, 4, 0, b"\x30"), [0.2] * 3),
    ],
)
def test_modes_of_eight_bits_and_less(tmp_path: Path, make: Callable[[Path], Any], right: list[float]) -> None:
    path = tmp_path / "x.png"
    make(path)
    assert channels(path) == pytest.approx(right)


def test_printers_colours(tmp_path: Path) -> None:
    # Cyan 80 %, no magenta, all yellow, no black.
    Image.new("CMYK", (2, 2), (204, 0, 255, 0)).save(tmp_path / "x.tif")
    assert channels(tmp_path / "x.tif") == pytest.approx([0.2, 1, 0])


def test_floats_from_0_to_1_are_taken(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.tif", np.array([[0.25, 1], [0, 0.5]], dtype=np.float32))
    assert channels(path) == [0.25] * 3


@pytest.mark.parametrize("wrong", [-0.5, 1.5, 255.0, float("nan"), float("inf")])
def test_other_floats_are_refused(tmp_path: Path, wrong: float) -> None:
    path = saved(tmp_path / "x.tif", np.array([[0.25, wrong]], dtype=np.float32))
    assert "(mode F) has values from " in refused(path)


def test_integers_of_thirty_two_bits_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.tif", np.array([[1, 70000]], dtype=np.int32))
    assert "(mode I) has " in refused(path)


def test_signed_integers_are_refused(tmp_path: Path) -> None:
    path = tiff(tmp_path / "x.tif", np.array([[-1000, 300]], dtype=np.int16), signed=2)
    assert "has signed values, whose range is not known" in refused(path)


def test_other_modes_are_refused(tmp_path: Path) -> None:
    Image.new("LAB", (2, 2)).save(tmp_path / "x.tif")
    assert "(mode LAB) is of no mode that is read" in refused(tmp_path / "x.tif")


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
def test_transparent_pixels_are_refused(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 2), (51, 255, 0, 255))
    image.putpixel((1, 1), (0, 0, 0, 128))
    image = image.quantize(4) if mode == "PA" else image.convert(mode)
    image.save(tmp_path / "x.png")
    assert "has transparent pixels" in refused(tmp_path / "x.png")


def test_a_transparent_colour_is_refused_where_a_pixel_has_it(tmp_path: Path) -> None:
    for colour, transparent in ((7, True), (8, False)):
        Image.new("L", (2, 2), 7).save(tmp_path / "x.png", transparency=colour)
        if transparent:
            assert "(mode L) has transparent pixels" in refused(tmp_path / "x.png")
        else:
            assert channels(tmp_path / "x.png") == pytest.approx([7 / 255] * 3)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_several_frames_are_refused(tmp_path: Path, suffix: str) -> None:
    first, *others = [Image.new("RGB", (4, 4), (level, 0, 0)) for level in (0, 100, 200)]
    first.save(tmp_path / f"x.{suffix}", save_all=True, append_images=others)
    assert "has 3 frames, and one picture is read" in refused(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_a_picture_is_turned_as_its_exif_data_say(tmp_path: Path, suffix: str) -> None:
    """6: the file's first column is the top row, from the right."""
    path = tmp_path / f"x.{suffix}"
    image = Image.new("RGB", (32, 16), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 16, 16))  # the left half is white: it becomes the upper half
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    more = {"tiffinfo": _turned()} if suffix == "tif" else {"exif": exif}
    image.save(path, **more)
    found = np.asarray(read_image(str(path)))
    assert found.shape == (32, 16, 3)
    assert found[:12].min() > 200 and found[20:].max() < 50
    assert read_header(str(path)).size == (16, 32)


def _turned() -> Any:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[ORIENTATION] = 6
    return info


def test_a_picture_of_sixteen_bits_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 3  # upside down
    path = saved(tmp_path / "x.png", DEEP, exif=exif)
    assert np.asarray(read_image(str(path))).ravel().tolist() == pytest.approx([0.6, 0, 1, 0.2])


def test_a_picture_larger_than_pil_reads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.png", np.zeros((20, 20), dtype=np.uint8))
    for limit in (300, 100):  # more than the limit, and more than twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert f"has more than the {limit} pixels that PIL reads" in refused(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"x.{suffix}", np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    whole = path.read_bytes()
    for share in (0, 0.01, 0.1, 0.5, 0.8):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert "cannot be read as an image" in refused(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    (tmp_path / "y.png").symlink_to(tmp_path / "gone")
    for name in ("x.png", "y.png", "z.png"):
        assert "cannot be read as an image (it is no file)" in refused(tmp_path / name)


# In a folder


def folder(root: Path, make: Callable[[Path, int], Any]) -> Path:
    for split, count in (("train", 4), ("test", 2)):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                make(root / split / label / f"{number}.png", number)
    return root


def from_folder(root: Path, **options: Any) -> Any:
    given = {"dataset": "image_folder", "data_cache_dir": str(root), "client_num_in_total": 2}
    return load(config(**{**given, "client_num_per_round": 2, **options}))


def test_a_folder_of_sixteen_bits(tmp_path: Path) -> None:
    root = folder(tmp_path, lambda path, _: saved(path, DEEP))
    image = from_folder(root).global_test.dataset[0][0]
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    right = (torch.tensor([[0.2, 1], [0, 0.6]]) - mean[:, None, None]) / deviation[:, None, None]
    assert torch.allclose(image, right, atol=1e-6)
    resized = from_folder(root, image_size=1).global_test.dataset[0][0]
    assert torch.allclose(resized[:, 0, 0], (0.45 - mean) / deviation, atol=1e-3)


def test_one_picture_of_each_kind_is_opened_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the folder is too large to be decoded as a whole."""
    monkeypatch.setattr("fedsq_plugin.data.image_folder.MEMORY", 0)
    root = folder(tmp_path, lambda path, number: saved(path, DEEP if number else np.array([[1, 2]], dtype=np.uint8)))
    saved(root / "train" / "b" / "3.png", np.array([[1.5]], dtype=np.float32), format="TIFF")
    with pytest.raises(ConfigError, match=r"b/3\.png \(mode F\) has values from 1.5 to 1.5"):
        from_folder(root, image_size=4)


@pytest.mark.parametrize("name", ["scan.dcm", "moving.gif", "levels.npy", "large.jp2"])
def test_an_image_that_would_be_passed_over_is_named(tmp_path: Path, name: str) -> None:
    root = folder(tmp_path, lambda path, _: saved(path, DEEP))
    (root / "train" / "a" / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=rf"a/{name} is not read, only \.jpg"):
        from_folder(root)


def test_other_files_are_nobodys_business(tmp_path: Path) -> None:
    root = folder(tmp_path, lambda path, _: saved(path, DEEP))
    for name in ("notes.txt", ".DS_Store", "labels.csv"):
        (root / "train" / "a" / name).write_text("x")
    assert sum(from_folder(root).sizes.values()) == 8


def test_a_folder_with_an_images_name_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path, lambda path, _: saved(path, DEEP))
    (root / "train" / "a" / "9.png").mkdir()
    with pytest.raises(ConfigError, match=r"a/9\.png is a folder"):
        from_folder(root)
