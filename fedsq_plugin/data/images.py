"""Pictures from files, each scaled to [0, 1] by the range of its mode. What has no such range is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, in_one_line

COLOURS = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA", "RGBX")
"""Modes of 8 bits a channel or less, of which PIL itself makes 8-bit red, green and blue."""
FLOATS = ("F",)
_BITS_OF = {"PNG": 16, "PPM": 16, "JPEG2000": 16}
"""Bits of the grey levels that PIL gives for a format's deep pictures, whatever it calls their mode; TIFF says it
itself."""
_BITS, _PHOTOMETRIC, _FORMAT, _ORIENTATION = 258, 262, 339, 274
"""Tags of TIFF; the last also of EXIF."""


class Header(NamedTuple):
    """What the beginning of a file says of its picture."""

    format: str
    mode: str
    """PIL's name."""
    size: tuple[int, int]
    """Width and height in pixels, as the picture is shown."""


def read_header(path: str) -> Header:
    """Read the beginning of a picture's file. Raises ConfigError where `read_image` could not read the file's kind."""
    found: Header = _with_image(path, _header)
    return found


def read_image(path: str) -> Any:
    """Read a picture, turned as its EXIF data say: a PIL image of mode RGB (8 bits a channel), or of mode F with grey
    levels in [0, 1] where the file has more than 8 bits.

    Raises:
        ConfigError: it cannot be read, has several frames or transparent pixels, or no range is known for its mode.
    """
    return _with_image(path, _pixels)


def _header(image: Any, path: str) -> Header:
    _refuse_frames(image, path)
    if image.mode not in (*COLOURS, *FLOATS):
        _bits(image, path)
    width, height = image.size
    size = (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)
    return Header(str(image.format), image.mode, size)


def _pixels(image: Any, path: str) -> Any:
    from PIL import Image, ImageOps

    _refuse_frames(image, path)
    turned = _orientation(image) in range(2, 9)
    if image.mode in COLOURS:
        _refuse_transparency(image, path)
        found = image.convert("RGB")
    elif image.mode in FLOATS:
        found = image.copy()
        levels = np.asarray(found)
        if not (np.isfinite(levels).all() and levels.min() >= 0 and levels.max() <= 1):
            raise _refusal(path, image, f"has values from {levels.min():g} to {levels.max():g}, and [0, 1] is read")
    else:
        found = Image.fromarray(_grey_levels(image, path))
    if turned:
        found.getexif()[_ORIENTATION] = image.getexif()[_ORIENTATION]
        found = ImageOps.exif_transpose(found)
    return found


def _grey_levels(image: Any, path: str) -> npt.NDArray[np.float32]:
    largest = 2 ** _bits(image, path) - 1
    levels: npt.NDArray[np.float64] = np.asarray(image).astype(np.float64)
    if levels.min() < 0 or levels.max() > largest:
        raise _refusal(path, image, f"has values from {levels.min():g} to {levels.max():g}, not from 0 to {largest}")
    tags = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == 0:  # 0 is white, which PIL minds for 8 bits alone
        levels = largest - levels
    scaled: npt.NDArray[np.float32] = (levels / largest).astype(np.float32)
    return scaled


def _bits(image: Any, path: str) -> int:
    """Bits of a deep grey level in the file; PIL's mode I may hold 16 or 32 of them."""
    if not image.mode.startswith("I"):
        raise _refusal(path, image, "is of no mode that is read")
    bits = _BITS_OF.get(str(image.format), 32)
    tags = getattr(image, "tag_v2", {})
    if image.format == "TIFF":
        bits = max(tags.get(_BITS, (32,)))
        if max(tags.get(_FORMAT, (1,))) != 1:
            raise _refusal(path, image, "has signed values, whose range is not known")
    if bits > 16:
        raise _refusal(path, image, f"has integers of {bits} bits, whose range is not known")
    return int(bits)


def _orientation(image: Any) -> int:
    """How the picture is turned in the file; 1: not at all."""
    # PIL turns TIFF files itself, and decodes all of a PNG file to look for EXIF data at its end.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    return int(image.getexif().get(_ORIENTATION, 1))


def _refuse_frames(image: Any, path: str) -> None:
    # Cameras put a preview behind the picture (MPO).
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise _refusal(path, image, f"has {frames} frames, and one picture is read")


def _refuse_transparency(image: Any, path: str) -> None:
    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info:
        return
    if image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise _refusal(path, image, "has transparent pixels, and what is behind them is not known")


def _refusal(path: str, image: Any, what: str) -> ConfigError:
    return ConfigError(
        f"image_folder: {path} (mode {image.mode}) {what}; save it as 8-bit grey levels or RGB, or 16-bit grey levels"
    )


def _with_image(path: str, use: Callable[[Any, str], Any]) -> Any:
    from PIL import Image

    if not Path(path).is_file():
        raise ConfigError(f"image_folder: {path} cannot be read as an image (it is no file)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error says in one line what PIL warns of
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return use(image, path)
    except ConfigError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ConfigError(
            f"image_folder: {path} has more than the {Image.MAX_IMAGE_PIXELS} pixels that PIL reads; make it smaller"
        ) from None
    except Exception as error:  # damaged files end in nearly any exception
        raise ConfigError(f"image_folder: {path} cannot be read as an image ({in_one_line(error)})") from None
