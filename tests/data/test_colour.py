"""A photograph stored in any colour space comes back as it was: profiles are judged by what they do."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from safelight.data.colour import (
    CICP_PRIMARIES,
    SRGB_CHROMATICITY,
    SRGB_CURVE,
    VIDEO_CURVE,
    icc_profile,
    matrix_profile,
)
from safelight.data.images import decode
from tests.data.mutated_pictures import chunk, saved

ADOBE = (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
PROPHOTO = (0.3457, 0.3585, 0.7347, 0.2653, 0.1596, 0.8404, 0.0366, 0.0001)
# what an eye would not see, and 8 bits in another space can hold
MEAN_LIMIT = 2


def photo(mode: str = "RGB") -> Image.Image:
    """Return a smooth picture of muted colours, from black to white, that every space below contains."""
    y, x = np.mgrid[0:64, 0:96]
    grey = 255 * (x + 0.5) / 96
    waves = [40 * np.sin(y / 9 + shift) * (1 - np.abs(grey / 127.5 - 1)) for shift in (0, 2, 4)]
    pixels = np.clip(np.stack([grey + wave for wave in waves], axis=-1), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    return image if mode == "RGB" else image.convert(mode)


def gray(curve: bytes) -> bytes:
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * value) for value in (0.9642, 1, 0.8249)))
    return icc_profile("GRAY", {"wtpt": white, "kTRC": curve})


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * value))


def table(function) -> bytes:
    values = np.rint(65535 * function(np.linspace(0, 1, 256))).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", 256) + values.tobytes()


def with_name(profile: bytes, name: str) -> bytes:
    """Return the profile with a description, which says nothing about its colours."""
    text = b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 2 * len(name), 28) + name.encode("utf-16-be")
    (num_tags,) = struct.unpack_from(">I", profile, 128)
    tags = {}
    for i in range(num_tags):
        tag, start, size = struct.unpack_from(">4sII", profile, 132 + 12 * i)
        tags[tag.decode()] = profile[start : start + size]
    return icc_profile(profile[16:20].decode(), {"desc": text, **tags})


def lut_profile(channels: str, to_lab) -> bytes:
    """Return a profile that is a table. channels: "RGB " or "CMYK". to_lab: (N, channels) in 0..1 -> (N, 3) in Lab."""
    num = {"RGB ": 3, "CMYK": 4}[channels]
    points = {3: 17, 4: 9}[num]
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, points)] * num, indexing="ij"), axis=-1).reshape(-1, num)
    lab = to_lab(grid)
    # 16-bit Lab of version 2: L 0..100 -> 0..65280, a and b -128..127 -> 0..65280
    stored = np.clip(np.stack([lab[:, 0] * 652.8, (lab[:, 1] + 128) * 256, (lab[:, 2] + 128) * 256], axis=-1), 0, 65535)
    identity = struct.pack(">9i", *(65536 * int(i in (0, 4, 8)) for i in range(9)))
    element = b"mft2\0\0\0\0" + bytes([num, 3, points, 0]) + identity + struct.pack(">HH", 2, 2)
    element += (
        struct.pack(">HH", 0, 65535) * num + np.rint(stored).astype(">u2").tobytes() + struct.pack(">HH", 0, 65535) * 3
    )
    profile = bytearray(icc_profile(channels, {"A2B0": element, "A2B1": element}))
    profile[8:12], profile[12:16], profile[20:24] = b"\x02\x40\0\0", b"prtr", b"Lab "
    return bytes(profile)


def lab_of_srgb(rgb: np.ndarray) -> np.ndarray:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4361, 0.2225, 0.0139], [0.3851, 0.7169, 0.0971], [0.1431, 0.0606, 0.7141]])
    ratio = xyz / np.array([0.9642, 1.0, 0.8249])
    root = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.stack([116 * root[:, 1] - 16, 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])], axis=-1)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RGB_PROFILES = {
    "linear sRGB by the name of sRGB": with_name(matrix_profile(SRGB_CHROMATICITY, (1.0,)), "sRGB built-in linear"),
    "sRGB with gamma 2.2": matrix_profile(SRGB_CHROMATICITY, (2.2,)),
    "sRGB with gamma 1.8": matrix_profile(SRGB_CHROMATICITY, (1.8,)),
    "Display P3": matrix_profile(CICP_PRIMARIES[12], SRGB_CURVE),
    "Adobe RGB": matrix_profile(ADOBE, (563 / 256,)),
    "ProPhoto": matrix_profile(PROPHOTO, (1.8,)),
    "Rec. 2020": matrix_profile(CICP_PRIMARIES[9], VIDEO_CURVE),
}
GREY_PROFILES = {
    "gamma 1.0": gray(gamma(1.0)),
    "gamma 1.8": gray(gamma(1.8)),
    "gamma 2.2": gray(gamma(2.2)),
    "dot gain 20%": gray(table(lambda x: 1 - ((1 - x) + 0.8 * (1 - x) * x))),
    "sRGB's curve": gray(table(lambda x: np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4))),
}


def stored_in(profile: bytes, image: Image.Image) -> Image.Image:
    """Return the sRGB image in the colours of the profile."""
    target = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"RGB": "RGB", "GRAY": "L"}[target.profile.xcolor_space.strip()]
    srgb = ImageCms.createProfile("sRGB")
    stored = ImageCms.profileToProfile(image.convert("RGB"), srgb, target, renderingIntent=1, outputMode=mode)
    # Pillow would write the profile into files without being asked
    stored.info = {}
    return stored


def mean_difference(image: Image.Image, expected: Image.Image) -> float:
    return float(np.abs(np.asarray(image, float) - np.asarray(expected.convert("RGB"), float)).mean())


@pytest.mark.parametrize("name", RGB_PROFILES)
def test_a_photograph_in_another_rgb_comes_back(name):
    profile, original = RGB_PROFILES[name], photo()
    stored = stored_in(profile, original)
    for image_format, options in (("PNG", {}), ("TIFF", {}), ("JPEG", {"quality": 100, "subsampling": 0})):
        decoded = decode(saved(stored, image_format, icc_profile=profile, **options))
        assert mean_difference(decoded.image, original) < MEAN_LIMIT
        assert not decoded.is_copyable
        assert decoded.warning == ""
    # without the profile it would not: the picture differs
    assert mean_difference(stored, original) > 0.7


@pytest.mark.parametrize("name", GREY_PROFILES)
def test_a_grey_photograph_comes_back(name):
    profile, original = GREY_PROFILES[name], photo("L")
    stored = stored_in(profile, original)
    for image_format in ("PNG", "TIFF"):
        decoded = decode(saved(stored, image_format, icc_profile=profile))
        assert mean_difference(decoded.image, original) < MEAN_LIMIT
        assert decoded.warning == ""
    with_alpha = Image.merge("LA", [stored, Image.new("L", stored.size, 255)])
    decoded = decode(saved(with_alpha, "PNG", icc_profile=profile))
    assert mean_difference(decoded.image, original) < MEAN_LIMIT
    assert decoded.warning == ""
    # 16 bits are reduced to 8 first, which is exact enough for the mean
    deep = Image.fromarray(np.asarray(stored).astype(np.uint16) * 257)
    assert mean_difference(decode(saved(deep, "PNG", icc_profile=profile)).image, original) < MEAN_LIMIT


def test_tables_are_applied():
    """A profile of tables instead of curves: of RGB that is stored inverted, and of CMYK."""
    original = photo()
    inverted = lut_profile("RGB ", lambda rgb: lab_of_srgb(1 - rgb))
    stored = Image.fromarray(255 - np.asarray(original))
    decoded = decode(saved(stored, "TIFF", icc_profile=inverted))
    assert decoded.warning == ""
    assert mean_difference(decoded.image, original) < MEAN_LIMIT
    # inks that dim each other as in a naive print, but with red and blue exchanged
    inks = lut_profile("CMYK", lambda cmyk: lab_of_srgb((1 - cmyk[:, 2::-1]) * (1 - cmyk[:, 3:])))
    cyan_magenta_yellow = 255 - np.asarray(original)[..., ::-1]
    stored = Image.merge(
        "CMYK", [*map(Image.fromarray, np.moveaxis(cyan_magenta_yellow, -1, 0)), Image.new("L", (96, 64))]
    )
    decoded = decode(saved(stored, "TIFF", icc_profile=inks))
    assert decoded.warning == ""
    assert mean_difference(decoded.image, original) < 3


@pytest.mark.parametrize(
    "profile",
    [
        SRGB,
        matrix_profile(SRGB_CHROMATICITY, SRGB_CURVE),
        with_name(matrix_profile(SRGB_CHROMATICITY, SRGB_CURVE), "Monitor of the laptop"),
    ],
    ids=["lcms", "ours", "by another name"],
)
def test_what_acts_as_srgb_comes_back_bit_for_bit(profile):
    original = photo()
    for image_format in ("JPEG", "PNG"):
        content = saved(original, image_format, icc_profile=profile)
        decoded = decode(content)
        assert decoded.image.tobytes() == Image.open(io.BytesIO(content)).convert("RGB").tobytes()
        assert decoded.is_copyable


def test_a_profile_for_other_channels_is_noted_and_not_used():
    original = photo()
    for profile, channels in (
        (GREY_PROFILES["gamma 1.0"], "GRAY"),
        (lut_profile("CMYK", lambda x: 100 * x[:, :3]), "CMYK"),
    ):
        decoded = decode(saved(original, "PNG", icc_profile=profile))
        assert decoded.image.tobytes() == original.tobytes()
        assert f"its colour profile is for {channels}, not for RGB" in decoded.warning
    # a profile of RGB in a grey picture, which many programs write, applies to it
    grey = photo("L")
    linear = matrix_profile(SRGB_CHROMATICITY, (1.0,))
    stored = stored_in(linear, grey).convert("L")
    assert mean_difference(decode(saved(stored, "PNG", icc_profile=linear)).image, grey) < MEAN_LIMIT


def test_what_is_written_again_has_no_foreign_profile():
    profile = RGB_PROFILES["Display P3"]
    image = decode(saved(stored_in(profile, photo()), "PNG", icc_profile=profile)).image
    for image_format in ("PNG", "WEBP", "JPEG"):
        assert "icc_profile" not in Image.open(io.BytesIO(saved(image, image_format))).info


def png_with(image: Image.Image, *chunks: bytes, **options) -> bytes:
    content = saved(image, "PNG", **options)
    return content[:33] + b"".join(chunks) + content[33:]


def gama(value: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(value * 100_000)))


def chrm(chromaticity: tuple[float, ...]) -> bytes:
    return chunk(b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in chromaticity)))


def test_the_gamma_of_a_png_is_heeded():
    for original in (photo(), photo("L")):
        linear = stored_in(matrix_profile(SRGB_CHROMATICITY, (1.0,)), original).convert(original.mode)
        decoded = decode(png_with(linear, gama(1.0)))
        assert mean_difference(decoded.image, original) < MEAN_LIMIT
        assert not decoded.is_copyable
    deep = Image.fromarray(np.asarray(linear).astype(np.uint16) * 257)
    assert mean_difference(decode(png_with(deep, gama(1.0))).image, original) < MEAN_LIMIT
    # programs that mean sRGB write 1 / 2.2
    assert decode(png_with(photo(), gama(0.45455))).image.tobytes() == photo().tobytes()
    assert decode(png_with(photo(), gama(0.45455), chrm(SRGB_CHROMATICITY))).is_copyable


def test_the_primaries_of_a_png_are_heeded():
    adobe = stored_in(RGB_PROFILES["Adobe RGB"], photo())
    assert mean_difference(decode(png_with(adobe, gama(256 / 563), chrm(ADOBE))).image, photo()) < MEAN_LIMIT
    assert mean_difference(adobe, photo()) > MEAN_LIMIT
    p3 = stored_in(RGB_PROFILES["Display P3"], photo())
    assert mean_difference(decode(png_with(p3, chunk(b"cICP", bytes([12, 13, 0, 1])))).image, photo()) < 0.5
    for points in (bytes(32), b"\xff" * 32, struct.pack(">8I", *[30000] * 8)):
        assert decode(png_with(photo(), gama(0.45455), chunk(b"cHRM", points))).image.tobytes() == photo().tobytes()
    assert decode(png_with(photo(), gama(0))).image.tobytes() == photo().tobytes()


def test_precedence_of_what_a_png_says():
    """cICP, then the ICC profile, then sRGB, then gAMA."""
    linear, srgb = matrix_profile(SRGB_CHROMATICITY, (1.0,)), chunk(b"sRGB", b"\0")
    stored = stored_in(linear, photo())
    as_it_is = stored.tobytes()
    assert decode(png_with(stored, srgb, gama(1.0))).image.tobytes() == as_it_is
    assert mean_difference(decode(png_with(stored, srgb, gama(0.45), icc_profile=linear)).image, photo()) < MEAN_LIMIT
    assert decode(png_with(stored, gama(1.0), icc_profile=SRGB)).image.tobytes() == as_it_is
    cicp = chunk(b"cICP", bytes([1, 8, 0, 1]))
    assert mean_difference(decode(png_with(stored, cicp, srgb, icc_profile=SRGB)).image, photo()) < MEAN_LIMIT
    assert "high dynamic range" in decode(png_with(photo(), chunk(b"cICP", bytes([9, 16, 0, 1])))).warning


def test_lab_is_converted():
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    stored = ImageCms.profileToProfile(photo(), srgb, lab, outputMode="LAB")
    assert mean_difference(decode(saved(stored, "TIFF")).image, photo()) < MEAN_LIMIT


def test_large_profiles_are_used_and_larger_ones_noted():
    """1.2 MB, more than Pillow unpacks from a PNG, and more than any profile has."""
    profile = RGB_PROFILES["Display P3"]
    stored = stored_in(profile, photo())
    large = png_with(stored, _iccp(profile + bytes(1_200_000)))
    assert mean_difference(decode(large).image, photo()) < 0.5
    for data in (_iccp(profile + bytes(2**24)), _iccp(b"\xff" * 200), chunk(b"iCCP", b"icc\0\0no zlib")):
        decoded = decode(png_with(photo(), data))
        assert decoded.image.tobytes() == photo().tobytes()
        assert "its colour profile is damaged or larger than 16 MiB and was not used" in decoded.warning


def _iccp(profile: bytes) -> bytes:

    return chunk(b"iCCP", b"icc\0\0" + zlib.compress(struct.pack(">I", len(profile)) + profile[4:]))
