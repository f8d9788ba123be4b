"""An image file gives upright RGB with the right colours, or is rejected with a reason."""

import contextlib
import hashlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from safelight.data.images import RejectedImage, decode, encode, open_image, shrunk_size
from tests.pixels import load_pixels


def saved(image, image_format, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.fixture
def corners():
    """A 32 x 16 image whose quarters are red, green, blue and white."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16], pixels[:8, 16:], pixels[8:, :16], pixels[8:, 16:] = (250, 0, 0), (0, 250, 0), (0, 0, 250), 250
    return Image.fromarray(pixels)


# the quarters of the upright image, row by row, for each EXIF orientation of the stored pixels
QUARTERS = {1: "RGBW", 2: "GRWB", 3: "WBGR", 4: "BWRG", 5: "RBGW", 6: "BRWG", 7: "WGBR", 8: "GWRB"}


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(corners, orientation, image_format):
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(image_format, {})
    decoded = decode(saved(corners, image_format, exif=exif(orientation), **options))
    assert decoded.image.size == ((32, 16) if orientation <= 4 else (16, 32))
    width, height = decoded.image.size
    places = [(width // 4, height // 4), (3 * width // 4, height // 4)]
    places += [(x, 3 * height // 4) for x, _ in places]
    names = {(True, False, False): "R", (False, True, False): "G", (False, False, True): "B", (True, True, True): "W"}
    quarters = "".join(names[tuple(channel > 128 for channel in decoded.image.getpixel(place))] for place in places)
    assert quarters == QUARTERS[orientation]
    assert decoded.is_copyable == (orientation == 1 and image_format != "TIFF")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_photo_with_damaged_exif_is_kept(make_noise):
    content = saved(make_noise(1), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 30)
    assert decode(content).image.size == (40, 30)


def test_alpha_is_composited_over_white():
    image = Image.new("RGBA", (20, 20), (200, 0, 0, 0))
    image.paste((0, 0, 100, 128), (10, 0, 20, 20))
    out = decode(saved(image, "PNG"))
    assert out.image.getpixel((0, 0)) == (255, 255, 255)
    assert out.image.getpixel((15, 5)) == pytest.approx((127, 127, 177), abs=1)
    assert not out.is_copyable


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([9, 9, 9, 10, 200, 30])
    image.paste(0, (0, 0, 10, 20))
    out = decode(saved(image, "PNG", transparency=0)).image
    assert out.getpixel((0, 0)) == (255, 255, 255)
    assert out.getpixel((15, 5)) == (10, 200, 30)


def test_rgb_png_with_a_transparent_colour_is_not_copied():
    out = decode(saved(Image.new("RGB", (20, 20), (1, 2, 3)), "PNG", transparency=(1, 2, 3)))
    assert out.image.getpixel((3, 3)) == (255, 255, 255)
    assert not out.is_copyable


def png_of(depth: int, kind: int, pixels: bytes, transparent: bytes) -> bytes:
    """Return a PNG of 32 x 16 equal rows. kind: 0 grey, 2 RGB. pixels: one row."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 16, depth, kind, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress((b"\0" + pixels) * 16))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", transparent) + rows + chunk(b"IEND", b"")


def test_the_transparent_value_of_a_png_is_of_the_depth_of_the_file():
    """The left half is transparent, and so white; the right half is dark."""
    for depth, kind in ((2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)):
        num_channels = 3 if kind else 1
        clear = (b"\x30\x39" if depth == 16 else bytes([1])) * num_channels
        dark = (b"\x01\x02" if depth == 16 else bytes([0])) * num_channels
        if depth >= 8:
            row = clear * 16 + dark * 16
        else:
            values = [1] * 16 + [0] * 16
            num = 8 // depth
            shifts = range(8 - depth, -1, -depth)
            parts = [values[at : at + num] for at in range(0, 32, num)]
            row = bytes(sum(value << shift for value, shift in zip(part, shifts, strict=True)) for part in parts)
        transparent = clear if depth == 16 else b"".join(bytes([0, value]) for value in clear)
        out = np.asarray(decode(png_of(depth, kind, row, transparent)).image)
        assert (out[:, :16] == 255).all(), (depth, kind)
        assert (out[:, 16:] < 4).all(), (depth, kind)


def test_16_bit_grey_keeps_its_brightness():
    ramp = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (16, 1))
    out = np.asarray(decode(saved(Image.fromarray(ramp), "PNG")).image)
    assert np.abs(out[0, :, 0].astype(float) - np.linspace(0, 255, 32)).max() <= 1
    assert (out[..., 0] == out[..., 2]).all()


def test_float_tiff_is_scaled_by_its_range():
    ramp = np.tile(np.linspace(0, 1, 32, dtype=np.float32), (16, 1))
    out = np.asarray(decode(saved(Image.fromarray(ramp), "TIFF")).image)
    assert np.abs(out[0, :, 0].astype(float) - np.linspace(0, 255, 32)).max() <= 1


def test_cmyk_and_grey_jpeg():
    cmyk = decode(saved(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG", quality=100))
    assert cmyk.image.getpixel((5, 5)) == pytest.approx((255, 0, 0), abs=3)
    grey = decode(saved(Image.new("L", (20, 20), 77), "JPEG"))
    assert grey.image.getpixel((5, 5)) == (77, 77, 77)
    assert not cmyk.is_copyable
    assert not grey.is_copyable


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_animated_gives_the_first_frame(image_format):
    first, second = Image.new("RGB", (20, 20), (255, 0, 0)), Image.new("RGB", (20, 20), (0, 0, 255))
    out = decode(saved(first, image_format, save_all=True, append_images=[second], duration=100))
    assert out.image.getpixel((5, 5)) == pytest.approx((255, 0, 0), abs=6)
    assert not out.is_copyable


def test_foreign_colour_profile_is_converted():
    """With a profile whose red and blue are swapped, a stored red becomes blue."""
    content = saved(Image.new("RGB", (20, 20), (250, 5, 5)), "PNG", icc_profile=_swapped_profile())
    out = decode(content)
    red, _, blue = out.image.getpixel((5, 5))
    assert blue > 200 > red
    assert not out.is_copyable
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode(saved(Image.new("RGB", (20, 20), (250, 5, 5)), "PNG", icc_profile=srgb)).is_copyable


def _swapped_profile() -> bytes:
    """Return an sRGB profile with its red and blue primaries swapped and with another name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tag_offsets = {}
    for i in range(struct.unpack(">I", data[128:132])[0]):
        start = 132 + 12 * i
        tag_offsets[bytes(data[start : start + 4])] = start
    red, blue = tag_offsets[b"rXYZ"], tag_offsets[b"bXYZ"]
    data[red + 4 : red + 12], data[blue + 4 : blue + 12] = data[blue + 4 : blue + 12], data[red + 4 : red + 12]
    return bytes(data).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be")).replace(b"sRGB", b"RGB ")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_truncated_file_is_rejected(make_noise, image_format):
    content = saved(make_noise(1, (64, 64)), image_format)
    with pytest.raises(RejectedImage):
        decode(content[: len(content) // 2])


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_not_an_image_is_rejected(content):
    with pytest.raises(RejectedImage):
        decode(content)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_every_damage_gives_an_image_or_a_reason(make_noise):
    """Overwrite random bytes in five formats: no exception other than RejectedImage."""
    rng = np.random.default_rng(5)
    for image_format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        content = saved(make_noise(2), image_format)
        for _ in range(60):
            damaged = bytearray(content)
            for position in rng.integers(0, min(len(damaged), 300), 4):
                damaged[position] = rng.integers(256)
            with contextlib.suppress(RejectedImage):
                assert decode(bytes(damaged)).image.mode == "RGB"


def test_decompression_bomb_is_rejected():
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(RejectedImage, match="megapixels"):
        decode(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT")


def test_tiny_image_is_rejected():
    with pytest.raises(RejectedImage, match="8 x 30 px is too small"):
        decode(saved(Image.new("RGB", (8, 30)), "PNG"))


@pytest.mark.parametrize("size", [(6000, 4000), (4000, 6000), (1225, 1225), (20000, 100), (1501, 1000)])
def test_shrunk_size_is_within_the_limit_and_near_it(size):
    width, height = shrunk_size(*size, 1.5)
    assert width * height <= 1.5e6
    assert (width + 1) * (height + 1) > 1.5e6
    assert width / height == pytest.approx(size[0] / size[1], rel=2 / height)


def test_shrinking_keeps_the_picture(corners):
    """After JPEG draft decoding and LANCZOS the quarters are where they were."""
    large = saved(corners.resize((3200, 1600), Image.Resampling.NEAREST), "JPEG", exif=exif(6))
    out = decode(large, max_megapixels=0.02)
    assert out.is_shrunk
    assert out.image.size == (100, 200)
    reference = decode(saved(corners, "PNG", exif=exif(6))).image.resize((100, 200), Image.Resampling.BOX)
    difference = np.abs(np.asarray(out.image, float) - np.asarray(reference, float)).mean()
    assert difference < 6


def test_content_hash_is_of_pixels(make_noise):
    image = make_noise(3)
    png, webp = saved(image, "PNG"), saved(image, "WEBP", lossless=True, exact=True)
    assert decode(png).content_sha256 == decode(webp).content_sha256
    assert decode(png).content_sha256 != decode(saved(make_noise(4), "PNG")).content_sha256
    # the same bytes in another shape are another picture
    assert (
        decode(saved(Image.new("RGB", (20, 40)), "PNG")).content_sha256
        != decode(saved(Image.new("RGB", (40, 20)), "PNG")).content_sha256
    )


def test_hashing_in_strips_equals_hashing_the_whole(monkeypatch, make_noise):
    """Datasets prepared by an earlier version, which hashed the whole, still recognize their photos."""
    image = Image.fromarray(np.asarray(make_noise(3).resize((57, 91)))).convert("RGB")
    whole = hashlib.sha256(b"RGB (57, 91)" + image.tobytes()).hexdigest()
    assert decode(saved(image, "PNG")).content_sha256 == whole
    # 17 rows per strip with a short last strip; strips of less than a row
    for size in (17 * 3 * 57, 100):
        monkeypatch.setattr("safelight.data.images.STRIP_BYTES", size)
        assert decode(saved(image, "PNG")).content_sha256 == whole


def test_encoding_keeps_the_colours(corners):
    corners = corners.resize((160, 80), Image.Resampling.NEAREST)
    for image_format in ("jpeg", "webp"):
        content, suffix = encode(corners, image_format, 95)
        out = Image.open(io.BytesIO(content))
        assert out.format.lower() == image_format
        assert suffix in (".jpg", ".webp")
        assert np.abs(np.asarray(out.convert("RGB"), float) - np.asarray(corners, float)).mean() < 4


@pytest.mark.parametrize("quality", [90, 95, 100])
def test_noise_is_encoded_without_a_word(capfd, quality):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8))
    content, _ = encode(noise, "jpeg", quality)
    assert Image.open(io.BytesIO(content)).size == (600, 600)
    assert capfd.readouterr() == ("", "")


def test_pixels_are_the_crop_in_the_range(tmp_path, corners):
    corners.save(tmp_path / "a.png")
    whole = load_pixels(tmp_path / "a.png", (0, 0, 32, 16), (32, 16), False)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole, np.asarray(corners, np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1)
    flipped = load_pixels(tmp_path / "a.png", (0, 0, 32, 16), (32, 16), True)
    np.testing.assert_array_equal(flipped, whole[:, :, ::-1])
    blue = load_pixels(tmp_path / "a.png", (2, 10, 10, 14), (4, 2), False)
    assert blue.shape == (3, 2, 4)
    # LANCZOS reaches a little beyond the box
    np.testing.assert_allclose(blue[:, 1, 1], [-1, -1, 250 / 127.5 - 1], atol=0.03)


def test_open_image_takes_paths_and_bytes_of_photographs_alone(tmp_path, corners):
    content = saved(corners, "PNG")
    (tmp_path / "a.png").write_bytes(content)
    for source in (tmp_path / "a.png", content):
        with open_image(source) as opened:
            assert opened.convert("RGB").tobytes() == corners.tobytes()
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\nshowpage\n")
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (("script.png", "not an image"), ("pipe.png", "not a regular file"), ("gone", "No such file")):
        with pytest.raises(RejectedImage, match=reason):
            open_image(tmp_path / name)


def test_libraries_write_nothing_to_the_terminal(capfd, make_noise):
    """libtiff writes to file descriptor 2 itself, past sys.stderr; Pillow warns and logs."""
    whole = saved(make_noise(1), "TIFF", compression="tiff_lzw")
    # the compressed pixels, the number of samples, the tags
    for damaged in (whole[:8] + b"\xff" * 60 + whole[68:], *(whole[:-n] + b"\xff" * n for n in range(4, 120, 4))):
        with contextlib.suppress(RejectedImage):
            decode(damaged)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
