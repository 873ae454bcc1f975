"""The reader of pictures from outside: every mode and depth as a viewer shows it, what is refused, and why."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import icc
import numpy as np
import pytest
from PIL import Image, ImageCms

from bench_dfusion.util import picture_reader
from bench_dfusion.util.picture_reader import PictureError

RAMP = np.linspace(0, 1, 1024).reshape(32, 32)
ORIENTATION = 0x0112


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def shown(image: Image.Image, kind: str = "PNG", **options: Any) -> np.ndarray:
    """What the reader makes of a picture saved as `kind`: int [H, W, 3]."""
    found = picture_reader.read(saved(image, kind, **options))
    assert found.mode == "RGB" and found.size[::-1] == np.asarray(found).shape[:2]
    return np.asarray(found).astype(int)


def first(image: Image.Image, kind: str = "PNG", **options: Any) -> list[int]:
    return shown(image, kind, **options)[0, 0].tolist()


def tiff(values: np.ndarray, bits: int, photometric: int = 1, sample: int = 1, order: str = "<") -> bytes:
    """A grey TIFF of one strip, of what Pillow does not write: values already packed."""
    data = values.tobytes()
    height, width = values.shape[0], values.shape[1] * values.itemsize * 8 // bits
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data)), (339, sample)]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(tags))
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def png(pixels: bytes, width: int, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one row, of what Pillow does not write."""
    content = [(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)), *chunks]
    content += [(b"IDAT", zlib.compress(b"\0" + pixels)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in content]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# ---------------------------------------------------------------- levels


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray((RAMP * 65535).round().astype("<u2"))),
        saved(Image.fromarray((RAMP * 65535).round().astype("<u2")), "TIFF"),
        saved(Image.fromarray((RAMP * 65535).round().astype(">u2")), "TIFF"),
        saved(Image.fromarray((RAMP * 65535).round().astype("<u2")), "PPM"),
        saved(Image.fromarray((RAMP * 65535).round().astype(np.int32)), "TIFF"),
        saved(Image.fromarray((RAMP * 255).round().astype(np.int32)), "TIFF"),
        saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        saved(Image.fromarray((RAMP * 255).round().astype(np.uint8))),
        tiff(((1 - RAMP) * 65535).round().astype("<u2"), 16, photometric=0),
        tiff((1 - RAMP).astype("<f4"), 32, photometric=0, sample=3),
        tiff((RAMP * 65535).round().astype(">u2"), 16, order=">"),
    ],
    ids=[
        "png16",
        "tiff16",
        "tiff16-big",
        "pgm16",
        "int32-of-16-bit",
        "int32-of-8-bit",
        "float",
        "8-bit",
        "white-is-zero",
        "float-white-is-zero",
        "big-endian",
    ],
)
def test_a_ramp_of_any_depth_keeps_its_256_greys(data: bytes) -> None:
    grey = np.asarray(picture_reader.read(data)).astype(int)
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 0] == grey[..., 2]).all()
    assert abs(grey[..., 0] - RAMP * 255).max() <= 1 and len(np.unique(grey)) == 256


def test_twelve_bits_reach_white() -> None:
    packed = np.array([[0x00, 0x0F, 0xFF]], np.uint8)  # 0 and 4095
    assert np.asarray(picture_reader.read(tiff(packed, 12)))[0, :, 0].tolist() == [0, 255]


def test_sixteen_bits_a_channel_lose_their_lower_halves() -> None:
    data = png(struct.pack(">6H", 0xFFFF, 0x8000, 0, 0x1234, 0, 0), 2, 16, 2)
    assert np.asarray(picture_reader.read(data))[0].tolist() == [[255, 128, 0], [0x12, 0, 0]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 255.0]], np.float32), "floats go from 0 to 255, not from 0 to 1"),
        (np.array([[-1, 1.0]], np.float32), "floats go from -1 to 1"),
        (np.array([[np.nan, 1.0]], np.float32), "not finite"),
        (np.array([[0, np.inf]], np.float32), "not finite"),
        (np.array([[0, 70_000]], np.int32), "integers go from 0 to 70000, not from 0 to 65535"),
        (np.array([[-5, 100]], np.int32), "integers go from -5 to 100"),
    ],
)
def test_levels_of_no_known_brightness_are_refused(values: np.ndarray, expected: str) -> None:
    with pytest.raises(PictureError, match=expected):
        picture_reader.read(saved(Image.fromarray(values), "TIFF"))


def test_floats_that_rounding_put_beside_the_range_are_read() -> None:
    assert shown(Image.fromarray(np.array([[-1e-4, 1.0001]], np.float32)), "TIFF")[0, :, 0].tolist() == [0, 255]


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "expected"),
    [
        ("1", 1, "PNG", [255, 255, 255]),
        ("L", 77, "PNG", [77, 77, 77]),
        ("LA", (77, 255), "PNG", [77, 77, 77]),
        ("LA", (0, 0), "PNG", [255, 255, 255]),
        ("PA", (0, 0), "TIFF", [255, 255, 255]),
        ("RGB", (1, 2, 3), "PNG", [1, 2, 3]),
        ("RGB", (1, 2, 3), "BMP", [1, 2, 3]),
        ("RGBA", (1, 2, 3, 255), "PNG", [1, 2, 3]),
        ("RGBA", (255, 0, 0, 0), "PNG", [255, 255, 255]),
        ("RGBA", (0, 0, 0, 102), "PNG", [153, 153, 153]),
        ("RGBA", (255, 0, 0, 0), "WEBP", [255, 255, 255]),
        ("RGBX", (1, 2, 3, 0), "TIFF", [1, 2, 3]),
        ("CMYK", (0, 255, 255, 0), "TIFF", [255, 0, 0]),
        ("YCbCr", (76, 85, 255), "TIFF", [254, 0, 0]),
        ("LAB", (255, 128, 128), "TIFF", [255, 255, 255]),
        ("LAB", (136, 208, 195), "TIFF", [250, 3, 11]),
    ],
)
def test_a_colour_of_every_mode(mode: str, colour: Any, kind: str, expected: list[int]) -> None:
    assert first(Image.new(mode, (4, 4), colour), kind) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"), [("La", (64, 128), [191] * 3), ("RGBa", (64, 0, 0, 128), [191, 127, 127])]
)
def test_colours_that_carry_their_opacity_already(mode: str, colour: Any, expected: list[int]) -> None:
    image = Image.new(mode, (2, 2), colour)  # in no file that Pillow writes
    found, alpha = picture_reader._colours(image, image, 8)
    assert picture_reader._on_white(found, alpha, print).getpixel((0, 0)) == pytest.approx(expected, abs=1)


def test_a_jpeg_in_cmyk_is_no_negative() -> None:
    assert first(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95) == pytest.approx([254, 0, 0], abs=3)


def test_a_palette_with_one_entry_or_many_transparent() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert shown(image)[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert shown(image, transparency=1)[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    assert shown(image, transparency=bytes([0, 255, 102]))[0].tolist() == [[255] * 3, [0, 255, 0], [153, 153, 255]]
    assert shown(image, "GIF", transparency=2)[0, 2].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(bytes([9, 200]), 2, 8, 0, (b"tRNS", b"\0\x09")), [[255] * 3, [200] * 3]),
        (png(bytes([0b0011_0000]), 2, 2, 0, (b"tRNS", b"\0\x03")), [[0] * 3, [255] * 3]),
        (png(bytes([0b0110_0000]), 2, 2, 0, (b"tRNS", b"\0\x01")), [[255] * 3, [170] * 3]),
        (png(bytes([0x1F]), 2, 4, 0, (b"tRNS", b"\0\x01")), [[255] * 3, [255] * 3]),
        (png(bytes([0b0100_0000]), 2, 1, 0, (b"tRNS", b"\0\x00")), [[255] * 3, [255] * 3]),
        (png(struct.pack(">2H", 300, 65535), 2, 16, 0, (b"tRNS", struct.pack(">H", 300))), [[255] * 3, [255] * 3]),
        (png(bytes([1, 2, 3, 1, 2, 4]), 2, 8, 2, (b"tRNS", struct.pack(">3H", 1, 2, 3))), [[255] * 3, [1, 2, 4]]),
        (
            png(struct.pack(">6H", 256, 512, 999, 0, 0, 0), 2, 16, 2, (b"tRNS", struct.pack(">3H", 256, 512, 999))),
            [[255] * 3, [0] * 3],
        ),
    ],
)
def test_one_colour_of_a_png_is_transparent(data: bytes, expected: list[list[int]]) -> None:
    assert np.asarray(picture_reader.read(data))[0].tolist() == expected


def test_of_an_animation_the_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert first(frames[0], kind, save_all=True, append_images=frames[1:], **options) == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_picture_is_turned_as_its_camera_says(kind: str, mode: str) -> None:
    image = Image.new(mode, (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the left side is up
    found = shown(image, kind, exif=exif)
    assert found.shape == (16, 8, 3) and found[:6].min() > 240 and found[10:].max() < 15


def test_a_deep_grey_is_turned_too() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    assert shown(Image.fromarray(np.array([[0, 65535]], np.uint16)), exif=exif)[0, :, 0].tolist() == [255, 0]


def test_exif_data_that_cannot_be_read_turn_nothing() -> None:
    assert first(Image.new("RGB", (4, 4), (1, 2, 3)), exif=b"Exif\0\0no such thing") == [1, 2, 3]


# ---------------------------------------------------------------- colour profiles

GREEN_INK = icc.cmyk((224, 49, 209))
SWAPPED = icc.rgb(icc.GREEN, icc.RED, icc.BLUE)


def remarks(data: bytes) -> tuple[list[int], list[str]]:
    said: list[str] = []
    return list(picture_reader.read(data, said.append).getpixel((0, 0))), said


@pytest.mark.parametrize(
    ("image", "kind", "profile", "expected"),
    [
        (Image.new("RGB", (8, 8), (255, 0, 0)), "PNG", SWAPPED, [0, 255, 0]),
        (Image.new("RGB", (8, 8), (255, 0, 0)), "WEBP", SWAPPED, [0, 255, 0]),
        (Image.new("RGB", (8, 8), (255, 0, 0)), "TIFF", SWAPPED, [0, 255, 0]),
        (Image.new("RGB", (8, 8), (255, 0, 0)), "JPEG", SWAPPED, [0, 255, 0]),
        (Image.new("P", (8, 8), 0), "PNG", SWAPPED, [0, 0, 0]),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 102)), "PNG", SWAPPED, [153, 255, 153]),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG", SWAPPED, [255, 255, 255]),
        (Image.new("L", (8, 8), 128), "PNG", icc.grey(1.0), [188] * 3),  # linear light: sRGB's curve is there
        (Image.new("I;16", (8, 8), 128 * 257), "PNG", icc.grey(1.0), [188] * 3),
        (Image.new("LA", (8, 8), (128, 0)), "PNG", icc.grey(1.0), [255] * 3),
        (Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "TIFF", GREEN_INK, [255] * 3),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF", GREEN_INK, [0, 255, 0]),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", GREEN_INK, [0, 255, 0]),
    ],
)
def test_a_profile_is_applied(image: Image.Image, kind: str, profile: bytes, expected: list[int]) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    colour, said = remarks(saved(image, kind, icc_profile=profile, **options))
    assert colour == pytest.approx(expected, abs=12) and not said


def test_the_profile_that_all_pictures_are_in_changes_no_bit() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), None):
        assert (shown(Image.fromarray(noise), icc_profile=profile) == noise).all()


@pytest.mark.parametrize("profile", [b"nonsense", SWAPPED[:-20], SWAPPED[:100], icc.grey(1.0), GREEN_INK])
def test_a_profile_that_is_broken_or_of_other_colours_is_said_and_left_out(profile: bytes) -> None:
    colour, said = remarks(saved(Image.new("RGB", (4, 4), (1, 2, 3)), icc_profile=profile))
    assert colour == [1, 2, 3] and len(said) == 1 and "\n" not in said[0]


# ---------------------------------------------------------------- what is refused


def jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return saved(Image.fromarray(noise), "JPEG")


def flipped() -> bytes:
    data = bytearray(saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: b"", "the file is empty"),
        (lambda: b"<html>404</html>", "no picture in a format that Pillow reads"),
        (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "no picture in a format"),
        (lambda: jpeg()[:2000], "damaged: image file is truncated"),
        (lambda: saved(Image.new("RGB", (64, 64)))[:60], "damaged"),
        (flipped, "damaged"),
        (lambda: saved(Image.new("1", (20_000, 20_000))), "more pixels than Pillow opens, and at most 67108864"),
        (lambda: saved(Image.new("1", (10_000, 10_000))), "10000 × 10000 pixels, and at most 67108864"),
        (lambda: saved(Image.new("1", (8193, 8192))), "8193 × 8192 pixels"),
        (lambda: b"P5 0 4 255\n", "no picture|no pixels"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(make: Callable[[], bytes], expected: str) -> None:
    with warnings.catch_warnings(), pytest.raises(PictureError, match=expected) as refused:
        warnings.simplefilter("error")
        picture_reader.read(make())
    assert "\n" not in str(refused.value)


def test_fewer_pixels_can_be_asked_for() -> None:
    data = saved(Image.new("L", (10, 10)))
    assert picture_reader.read(data, most=100).size == (10, 10)
    with pytest.raises(PictureError, match="at most 99 are read"):
        picture_reader.read(data, most=99)
