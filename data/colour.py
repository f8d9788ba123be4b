"""Convert pictures to sRGB by what their colour profile does, not by what it is called."""

from __future__ import annotations

import hashlib
import io
import struct
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from safelight.data.headers import MAX_PROFILE_BYTES, UNUSED_PROFILE

# a profile that moves no test colour by more than this many of 255 levels is sRGB: profiles round their curves
SRGB_TOLERANCE = 2
# libpng, too, takes a gamma this near to 1 / 2.2 for sRGB's curve, as which most programs write it
SRGB_GAMMA, SRGB_GAMMA_TOLERANCE = 0.45455, 0.05
CHROMATICITY_TOLERANCE = 0.002
# x and y of white, red, green, blue
SRGB_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
# ITU-T H.273, as in PNG's cICP: the chromaticities of colour primaries
CICP_PRIMARIES = {
    1: SRGB_CHROMATICITY,
    4: (0.31, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (0.3127, 0.329, 0.64, 0.33, 0.29, 0.6, 0.15, 0.06),
    6: (0.3127, 0.329, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    7: (0.3127, 0.329, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    12: (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}
# parametric curves of type 3, Y = (a X + b)^g above d, c X below: g, a, b, c, d
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
VIDEO_CURVE = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
CICP_CURVES = {4: (2.2,), 5: (2.8,), 8: (1.0,), 13: SRGB_CURVE} | dict.fromkeys((1, 6, 14, 15), VIDEO_CURVE)
CICP_HDR = {16: "PQ", 18: "HLG"}
MAX_KNOWN_PROFILES = 256
# (mode, cICP, hash of the profile) of pictures that turned out to be sRGB
_known_srgb: set[tuple[str, tuple[int, ...] | None, bytes]] = set()
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
# what the channels of a profile may be applied to
_MODES = {"RGB": "RGB", "CMYK": "CMYK", "GRAY": "L", "Lab": "LAB"}


def to_srgb(image: Image.Image, info: dict[str, Any]) -> tuple[Image.Image, bool, str]:
    """Return (the L, RGB, CMYK or LAB image as sRGB, whether its profile changed it, a warning or "").

    info: the file's metadata under Pillow's names. Of several descriptions the one that PNG prefers decides: cICP,
    then the ICC profile, then an sRGB chunk, then gAMA with cHRM.
    """
    # most photographs have one of a few profiles, and testing one takes as long as decoding a small photograph
    key = (image.mode, info.get("cicp"), hashlib.sha256(info.get("icc_profile") or b"").digest())
    if key in _known_srgb:
        return _plain(image), False, ""
    try:
        profile, warning = _profile(image.mode, info)
        if profile is None:
            return _plain(image), False, warning
        if image.mode == "L" and _channels(profile) == "RGB":
            image = image.convert("RGB")
        transform = _transform(profile, image.mode)
        if _is_identity(transform, image.mode):
            if info.get("icc_profile") and len(_known_srgb) < MAX_KNOWN_PROFILES:
                _known_srgb.add(key)
            return _plain(image), False, warning
        return ImageCms.applyTransform(image, transform), True, warning
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        return _plain(image), False, f"its colour profile cannot be used ({error}); the colours are treated as sRGB"


def _plain(image: Image.Image) -> Image.Image:
    """Return the image as RGB without a profile."""
    if image.mode != "LAB":
        return image.convert("RGB")
    return ImageCms.applyTransform(image, _transform(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB"))


def _channels(profile: ImageCms.ImageCmsProfile) -> str:
    return profile.profile.xcolor_space.strip()


def _profile(mode: str, info: dict[str, Any]) -> tuple[ImageCms.ImageCmsProfile | None, str]:
    """Return (the profile that describes an image of this mode, None for sRGB; a warning or "")."""
    if "cicp" in info:
        primaries, curve = CICP_PRIMARIES.get(info["cicp"][0]), CICP_CURVES.get(info["cicp"][1])
        if primaries and curve:
            return _parse(matrix_profile(primaries, curve)), ""
        if info["cicp"][1] in CICP_HDR:
            return None, f"its high dynamic range ({CICP_HDR[info['cicp'][1]]}) was treated as sRGB; export it as sRGB"
    icc = info.get("icc_profile")
    if icc:
        if len(icc) > MAX_PROFILE_BYTES:
            return None, UNUSED_PROFILE
        try:
            profile = _parse(icc)
        except (ImageCms.PyCMSError, OSError):
            return None, UNUSED_PROFILE
        channels = _MODES.get(_channels(profile))
        if channels == mode or (channels, mode) == ("RGB", "L"):
            return profile, ""
        return None, f"its colour profile is for {_channels(profile)}, not for {mode}, and was not used"
    if "srgb" in info or mode not in ("L", "RGB"):
        return None, ""
    gamma, chromaticity = info.get("gamma"), info.get("chromaticity")
    is_gamma = isinstance(gamma, float) and 0.1 <= gamma <= 10
    if not (isinstance(chromaticity, tuple) and _are_primaries(chromaticity)):
        chromaticity = SRGB_CHROMATICITY
    is_srgb_curve = not is_gamma or abs(gamma / SRGB_GAMMA - 1) <= SRGB_GAMMA_TOLERANCE
    if is_srgb_curve and np.abs(np.subtract(chromaticity, SRGB_CHROMATICITY)).max() < CHROMATICITY_TOLERANCE:
        return None, ""
    return _parse(matrix_profile(chromaticity, (1 / gamma,) if is_gamma else SRGB_CURVE)), ""


def _are_primaries(chromaticity: tuple[float, ...]) -> bool:
    """Return whether these are points of the plane of colours that span a triangle around white."""
    x, y = np.reshape(chromaticity, (4, 2)).T
    if x.min() < 0 or y.min() < 0.001 or (x + y).max() > 1.001:
        return False
    try:
        weights = np.linalg.solve(np.stack([x[1:], y[1:], np.ones(3)]), np.array([x[0], y[0], 1.0]))
    except np.linalg.LinAlgError:
        return False
    return bool(weights.min() > 0.01)


def _parse(icc: bytes) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(io.BytesIO(icc))


def _transform(profile: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    # relative colorimetric, not perceptual: the same for matrix profiles, and without a maker's taste for tables
    target, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
    return ImageCms.buildTransform(profile, target, mode, "RGB", renderingIntent=intent)


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a transform leaves test colours, 9 levels of each channel and all greys, as they are."""
    if mode not in ("L", "RGB"):
        return False
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    pixels = grey if mode == "L" else np.concatenate([grey, colours])
    before = Image.fromarray(pixels[None, :, 0] if mode == "L" else pixels[None])
    after = np.asarray(ImageCms.applyTransform(before, transform))
    return int(np.abs(after[0].astype(int) - pixels).max()) <= SRGB_TOLERANCE


def matrix_profile(chromaticity: tuple[float, ...], curve: tuple[float, ...]) -> bytes:
    """Return an ICC profile of three primaries.

    chromaticity: x and y of white, red, green, blue. curve: (gamma,) or g, a, b, c, d of a parametric curve of type 3.
    """
    points = np.reshape(np.asarray(chromaticity, np.float64), (4, 2))
    white, *primaries = (np.array([x / y, 1.0, (1 - x - y) / y]) for x, y in points)
    matrix = np.stack(primaries, axis=1)
    matrix = matrix * np.linalg.solve(matrix, white)
    # ICC profiles are relative to the white D50
    adaptation = np.linalg.inv(_BRADFORD) @ np.diag(_BRADFORD @ _D50 / (_BRADFORD @ white)) @ _BRADFORD
    tags = {f"{name}XYZ": b"XYZ \0\0\0\0" + _fixed(adaptation @ matrix[:, i]) for i, name in enumerate("rgb")}
    tags["wtpt"] = b"XYZ \0\0\0\0" + _fixed(_D50)
    shape = b"para\0\0\0\0" + struct.pack(">HH", 3 if len(curve) > 1 else 0, 0) + _fixed(curve)
    tags |= {f"{name}TRC": shape for name in "rgb"}
    return icc_profile("RGB ", tags)


def _fixed(values: Any) -> bytes:
    return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)


def icc_profile(channels: str, tags: dict[str, bytes]) -> bytes:
    """Return the bytes of an ICC display profile. channels: "RGB " or "GRAY". tags: signature -> element."""
    table, elements = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, element in tags.items():
        table += name.encode() + struct.pack(">II", start + len(elements), len(element))
        elements += element + bytes(-len(element) % 4)
    size = start + len(elements)
    header = struct.pack(">I4xI4s4s4s12x4s", size, 0x04300000, b"mntr", channels.encode(), b"XYZ ", b"acsp")
    header = header.ljust(68, b"\0") + _fixed(_D50)
    return header.ljust(128, b"\0") + table + elements
