"""The one reader of pictures that come from outside: any file and mode that Pillow opens becomes 8-bit RGB, as a viewer
shows it on a white page.

Levels: integers of more than 8 bits are scaled from the range of their bits, floats from [0, 1]; what has no known
brightness is refused. 32-bit integers up to 255 are taken as 8-bit, up to 65535 as 16-bit. Of an animation the first
frame is read, turned as its EXIF orientation says. A colour profile is applied before transparency is laid on white.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

MOST_PIXELS = 2**26  # of one picture (8192²), below what Pillow warns of as a decompression bomb
SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # what a profile calls the colours of a mode
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
HALF_LEVEL = 0.5 / 255  # how far a float may be out of [0, 1]: it is rounded to 8 bits anyway
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF

_opening = threading.Lock()


class PictureError(ValueError):
    """A picture that cannot be shown, and why, in one line."""


def read(data: bytes, ignored: Callable[[str], None] = lambda reason: None, most: int = MOST_PIXELS) -> Image.Image:
    """The picture in a file's bytes, mode RGB.

    `ignored` is told of a colour profile that cannot be applied; the picture is then read as if it had none. Raises
    PictureError where the bytes are no picture, are damaged, have no or more than `most` pixels, or hold levels of
    no known brightness.
    """
    try:
        with _open(data, most) as image:
            image.load()
            _measure(image, most)
            depth = data[24] if image.format == "PNG" else 8  # bits of a channel, as the file's header says
            return _on_white(*_colours(_turned(image), image, depth), ignored)
    except PictureError:
        raise
    except Exception as error:  # every format's decoder raises kinds of its own
        raise PictureError(_reason(error)) from None


def _open(data: bytes, most: int) -> Image.Image:
    if not data:
        raise PictureError("the file is empty")
    try:
        with _opening, warnings.catch_warnings():  # warnings are filtered for all threads at once
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.UnidentifiedImageError:
        raise PictureError("no picture in a format that Pillow reads") from None
    _measure(image, most)
    return image


@cache
def _formats() -> list[str]:
    """Pillow's formats but EPS, which Ghostscript would run as a program."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def _measure(image: Image.Image, most: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise PictureError(f"it has no pixels ({width} × {height})")
    if width * height > most:
        raise PictureError(f"it has {width} × {height} pixels, and at most {most} are read: make it smaller")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more pixels than Pillow opens, and at most {MOST_PIXELS} are read: make it smaller"
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    line = (str(error).strip().splitlines() or [""])[0]
    return f"damaged: {line or type(error).__name__}"


def _turned(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data that cannot be read turn nothing
        return image


# ---------------------------------------------------------------- levels and transparency


def _colours(image: Image.Image, source: Image.Image, depth: int) -> tuple[Image.Image, Image.Image | None]:
    """The picture in L, RGB, CMYK or LAB, and its opacity in L, None where all of it is opaque.

    `source` is the picture as it was opened, `depth` the bits of a channel in its file.
    """
    alpha = None
    if image.mode == "P":
        image = image.convert("RGBA")
    elif "transparency" in image.info:
        alpha = _opacity(image, depth)
    if image.mode in DEEP:
        levels = _levels(np.asarray(image), image.mode, _most_level(source))
        if getattr(source, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
            levels = 1 - levels
        info, image = image.info, Image.fromarray(np.rint(255 * levels).astype(np.uint8))
        image.info["icc_profile"] = info.get("icc_profile")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode == "La":  # which Pillow converts to nothing else
        image = image.convert("LA")
    elif image.mode in ("PA", "RGBa"):
        image = image.convert("RGBA")
    elif image.mode in ("RGBX", "YCbCr", "HSV"):
        image = image.convert("RGB")
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        image = image.getchannel("L") if image.mode == "LA" else image.convert("RGB")
    return image, alpha


def _most_level(image: Image.Image) -> int | None:
    """What white is in an integer mode of more than 8 bits; None where only the levels themselves can tell."""
    if image.mode == "I":
        return 65535 if image.format in ("PNG", "PPM") else None
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))
    return 2 ** int(bits[0]) - 1


def _levels(values: np.ndarray[Any, Any], mode: str, most: int | None) -> np.ndarray[Any, Any]:
    """Levels in [0, 1]. Raises PictureError where nothing says how bright they are."""
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise PictureError("its levels are not finite")
    low, high = float(values.min()), float(values.max())
    if mode == "F":
        if low < -HALF_LEVEL or high > 1 + HALF_LEVEL:
            raise PictureError(f"its floats go from {low:.4g} to {high:.4g}, not from 0 to 1: save it with 8 bits")
        return values.clip(0, 1)
    if most is None:
        most = 255 if high <= 255 else 65535
    if low < 0 or high > most:
        raise PictureError(f"its integers go from {low:.0f} to {high:.0f}, not from 0 to {most}: save it with 8 bits")
    return values / most


def _opacity(image: Image.Image, depth: int) -> Image.Image | None:
    """Opacity of a picture with one transparent colour, whose channels have `depth` bits in the file."""
    key = np.atleast_1d(image.info["transparency"])
    if key.dtype.kind not in "iu":
        return None
    if depth in (2, 4):  # Pillow scales the greys and leaves this as the file has it
        key = key * 255 // (2**depth - 1)
    elif depth == 16 and image.mode == "RGB":  # likewise: it keeps the upper halves
        key = key >> 8
    pixels = np.asarray(image)
    transparent = (pixels.reshape(*pixels.shape[:2], -1) == key).all(-1)
    return Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8))


# ---------------------------------------------------------------- colours


def _on_white(image: Image.Image, alpha: Image.Image | None, ignored: Callable[[str], None]) -> Image.Image:
    shown = _in_srgb(image, ignored)
    return shown if alpha is None else Image.composite(shown, Image.new("RGB", shown.size, "white"), alpha)


def _in_srgb(image: Image.Image, ignored: Callable[[str], None]) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":  # which is what a profile would lead to
        return _applied(image, _transform(None, "LAB"))
    if profile:
        try:
            transform = _transform(bytes(profile), image.mode)
        except Exception as error:  # of littlecms, as many kinds as of damage
            ignored(str(error).strip() or type(error).__name__)
        else:
            if transform is not None:
                return _applied(image, transform)
    return image.convert("RGB")


def _applied(image: Image.Image, transform: ImageCms.ImageCmsTransform | None) -> Image.Image:
    assert transform is not None
    found = ImageCms.applyTransform(image, transform)
    assert found is not None  # it is where nothing is done in place
    return found


@lru_cache(maxsize=16)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What takes colours of a profile (None: CIELAB itself) to sRGB; None where they are sRGB already."""
    srgb = ImageCms.createProfile("sRGB")
    if profile is None:
        return ImageCms.buildTransform(ImageCms.createProfile("LAB"), srgb, mode, "RGB")
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space != SPACES[mode]:
        raise ValueError(f"it is for {space} colours, the picture has {SPACES[mode]}")
    transform = ImageCms.buildTransform(source, srgb, mode, "RGB")
    if mode == "CMYK":
        return transform
    ramp = np.arange(0, 256, 17, dtype=np.uint8)
    probe = np.arange(256, dtype=np.uint8)[None] if mode == "L" else np.stack(np.meshgrid(ramp, ramp, ramp), -1)
    colours = Image.fromarray(probe if mode == "L" else probe.reshape(64, 64, 3))
    moved = np.asarray(_applied(colours, transform)).astype(int) - np.asarray(colours.convert("RGB"))
    return transform if abs(moved).max() > 1 else None  # one level is littlecms's rounding
