"""Loss masks: where they are found, how they are stored, and that their rows follow the photo's crop and flip."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from safelight.data.batches import EMPTY_CAPTION, MicroBatch, RowSource, SampleRef, load_batch
from safelight.data.buckets import Bucket
from safelight.data.cache import Cache, fill_latents, fill_texts
from safelight.data.manifest import read_manifest
from safelight.data.masks import fill_masks, mask_row
from safelight.data.photo import PhotoSettings
from safelight.data.prepare.ingest import ingest
from safelight.data.samples import Crop, empty_text_key, with_masks
from safelight.errors import UserError

EXIF_ORIENTATION = 0x0112


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


@pytest.fixture
def dataset(tmp_path):
    return tmp_path / "dataset"


def left_half(size: tuple[int, int], mode: str = "L") -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask.convert(mode)


def stored_mask(dataset, photo) -> np.ndarray:
    with Image.open(dataset / photo.mask) as mask:
        assert (mask.mode, mask.size) == ("L", (photo.width, photo.height))
        return np.asarray(mask)


def reasons(summary) -> dict[str, str]:
    return {item.path.rpartition("/")[2]: item.reason for item in summary.rejected}


@pytest.mark.parametrize(
    ("photo", "mask"),
    [
        ("a.jpg", "a-mask.png"),
        ("a.jpg", "a.jpg-mask.png"),
        ("A.JPG", "a-MASK.PNG"),
        ("caf\u00e9.png", "cafe\u0301-mask.png"),
        ("a.jpg", "a-masklabel.png"),
        ("a.jpg", "a.mask.png"),
        ("a.png", "a.png.mask.png"),
    ],
)
def test_a_picture_that_is_named_after_a_photo_is_its_mask(source, dataset, make_noise, photo, mask):
    make_noise(1, (64, 48)).save(source / photo)
    left_half((64, 48)).save(source / mask)
    summary = ingest([source], dataset)
    (found,) = summary.photos
    assert not summary.rejected
    assert (found.mask, len(found.mask_sha256)) == (f"masks/{found.mask.split('/')[1]}", 64)
    assert np.array_equal(stored_mask(dataset, found), np.asarray(left_half((64, 48))))
    # the mask alone is nothing to train on, nor is it another photo
    with pytest.raises(UserError, match="no photos found"):
        ingest([source / mask], dataset.with_name("other"))


def test_each_mask_goes_to_the_photo_of_its_name_and_one_of_no_photo_is_left_out(source, dataset, make_noise):
    for number, name in enumerate(("a.png", "a.webp", "b.png")):
        make_noise(number, (64, 48)).save(source / name)
    left_half((64, 48)).save(source / "a-mask.png")
    left_half((64, 48)).save(source / "c-mask.png")
    left_half((64, 48)).save(source / "a-masklabel.png")
    summary = ingest([source], dataset)
    assert {photo.source: bool(photo.mask) for photo in summary.photos} == {
        "photos/a.png": True,
        "photos/a.webp": True,
        "photos/b.png": False,
    }
    assert set(reasons(summary)) == {"c-mask.png", "a-masklabel.png"}
    assert "if it is a photograph itself, rename it" in reasons(summary)["c-mask.png"]


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "I;16", "RGBA"])
def test_masks_of_any_kind_become_8_bit_grey(source, dataset, make_noise, mode):
    make_noise(1, (64, 48)).save(source / "a.jpg")
    if mode == "I;16":
        mask = Image.fromarray(np.asarray(left_half((64, 48))).astype(np.uint16) * 257)
    elif mode == "RGBA":
        # white where it is opaque: what is transparent is left out
        mask = Image.new("RGBA", (64, 48), "white")
        mask.putalpha(left_half((64, 48)))
    else:
        mask = left_half((64, 48), mode)
    mask.save(source / "a-mask.png")
    (photo,) = ingest([source], dataset).photos
    assert np.array_equal(stored_mask(dataset, photo), np.asarray(left_half((64, 48))))


@pytest.mark.parametrize("mask_is_turned", [True, False])
def test_the_mask_is_turned_and_shrunk_with_its_photo(source, dataset, make_noise, mask_is_turned):
    """The photo lies on its side; its mask does as well, or was painted on the upright picture at half the size."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    make_noise(1, (240, 120)).save(source / "a.jpg", exif=exif)
    # of the upright photo, 120 x 240, the upper half
    upright = Image.new("L", (120, 240))
    upright.paste(255, (0, 0, 120, 120))
    if mask_is_turned:
        upright.transpose(Image.Transpose.ROTATE_90).save(source / "a-mask.png", exif=exif)
    else:
        upright.resize((60, 120), Image.Resampling.NEAREST).save(source / "a-mask.png")
    (photo,) = ingest([source], dataset, max_megapixels=0.0128).photos
    assert (photo.width, photo.height) == (80, 160)
    mask = stored_mask(dataset, photo)
    assert (mask[:80] == 255).all()
    assert (mask[80:] == 0).all()


def test_masks_that_cannot_be_used_are_named_with_their_photo(source, dataset, make_noise):
    for number, name in enumerate(("turned", "damaged", "text", "linked", "fine")):
        make_noise(number, (64, 48)).save(source / f"{name}.png")
    left_half((48, 64)).save(source / "turned-mask.png")
    left_half((64, 48)).save(source / "damaged-mask.png")
    content = (source / "damaged-mask.png").read_bytes()
    (source / "damaged-mask.png").write_bytes(content[: len(content) - 30])
    (source / "text-mask.png").write_text("no picture")
    (source / "linked-mask.png").symlink_to("/dev/zero")
    summary = ingest([source], dataset)
    assert [(photo.source, photo.mask) for photo in summary.photos] == [
        ("photos/fine.png", ""),
        ("photos/linked.png", ""),
    ]
    found = reasons(summary)
    assert found["linked-mask.png"].startswith("a link out of this folder, which is not followed; copy")
    assert found["turned.png"] == (
        "its mask turned-mask.png is 48 x 64 px, and the upright photo 64 x 48 px; give both the same size, or delete "
        "the mask"
    )
    for name in ("damaged", "text"):
        assert found[f"{name}.png"].startswith(f"its mask {name}-mask.png cannot be used: ")
        assert found[f"{name}.png"].endswith("; mend or delete it")


@pytest.mark.parametrize(
    "name",
    [
        "a-mask.jpg",
        "a_mask.png",
        "a mask.webp",
        "A_MASK.PNG",
        "amask.png",
        "a-masks.png",
        "a_mask_1.png",
        "a-mask (2).png",
        "a.jpg_mask.png",
        "mask_a.png",
        "masks/a.png",
        "near/Mask/a.jpg.png",
    ],
)
@pytest.mark.parametrize("is_sideways", [False, True])
def test_a_mask_of_a_slightly_wrong_name_is_no_photograph(source, dataset, make_noise, name, is_sideways):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6 if is_sideways else 1
    make_noise(1, (64, 48)).save(source / "a.jpg", exif=exif)
    if name.startswith("near"):
        (source / "near" / "photos").mkdir(parents=True)
        make_noise(2, (64, 48)).save(source / "near" / "photos" / "a.jpg", exif=exif)
    (source / name).parent.mkdir(exist_ok=True)
    left_half((128, 96), "RGB").save(source / name)
    summary = ingest([source], dataset)
    assert all(photo.source.endswith("a.jpg") for photo in summary.photos)
    (item,) = summary.rejected
    assert item.path == str(source / name)
    assert item.reason == (
        "looks like the mask of a.jpg; to have it read as one, save it beside that as a-mask.png; if it is a "
        "photograph itself, rename it"
    )


def test_what_does_not_look_like_a_mask_is_a_photograph(source, dataset, make_noise):
    make_noise(1, (64, 48)).save(source / "carnival.jpg")
    # in colours, of another shape, of no picture's name
    make_noise(2, (64, 48)).save(source / "carnival_mask.jpg")
    left_half((64, 64)).save(source / "carnival-mask2.png")
    left_half((64, 48)).save(source / "venetian_mask.png")
    left_half((48, 48)).save(source / "mask.png")
    summary = ingest([source], dataset)
    assert not summary.rejected
    assert len(summary.photos) == 5


def test_a_mask_that_was_taken_for_a_photograph_earlier_is_pruned(source, dataset, make_noise):
    make_noise(1, (64, 48)).save(source / "a.jpg")
    left_half((64, 48)).save(source / "venice.png")
    ingest([source], dataset)
    # as earlier versions have it in their manifests
    lines = (dataset / "manifest.jsonl").read_text().replace("photos/venice.png", "photos/a_mask.png")
    (dataset / "manifest.jsonl").write_text(lines)
    (source / "venice.png").rename(source / "a_mask.png")
    summary = ingest([source], dataset)
    assert len(summary.photos) == 2
    assert any("a_mask.png is no photograph but a mask; the dataset keeps" in note.text for note in summary.notes)
    (photo,) = ingest([source], dataset, prune=True).photos
    assert photo.source == "photos/a.jpg"


def test_a_black_mask_is_noticed(source, dataset, make_noise):
    make_noise(1, (64, 48)).save(source / "a.png")
    Image.new("L", (64, 48)).save(source / "a-mask.png")
    (note,) = ingest([source], dataset).notes
    assert note.text.endswith("a.png: its mask is black everywhere, so that nothing of it is learned")


def test_a_mask_that_changes_or_vanishes_is_noticed_and_its_file_follows(source, dataset, make_noise):
    make_noise(1, (64, 48)).save(source / "a.png")
    make_noise(2, (64, 48)).save(source / "b.png")
    left_half((64, 48)).save(source / "b-mask.png")
    first = {photo.source: photo for photo in ingest([source], dataset).photos}
    assert ingest([source], dataset).notes == []

    def again(expected: str) -> list[str]:
        summary = ingest([source], dataset)
        assert [(note.kind, note.text) for note in summary.notes] == [("mask", f"{source / expected}")]
        assert {photo.source: photo.sha256 for photo in summary.photos} == {k: p.sha256 for k, p in first.items()}
        used = sorted(photo.mask for photo in read_manifest(dataset) if photo.mask)
        assert sorted(path.relative_to(dataset).as_posix() for path in (dataset / "masks").iterdir()) == used
        return used

    left_half((64, 48)).save(source / "a-mask.png")
    assert len(again("a.png: it has a mask now")) == 2
    left_half((64, 48)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(source / "a-mask.png")
    assert len(again("a.png: its mask changed")) == 2
    (source / "a-mask.png").unlink()
    assert len(again("a.png: its mask is gone, so that all of it is learned from now on")) == 1
    (source / "b.png").unlink()
    (source / "b-mask.png").unlink()
    summary = ingest([source], dataset, prune=True)
    assert [photo.source for photo in summary.photos] == ["photos/a.png"]
    assert list((dataset / "masks").iterdir()) == []


def test_a_mask_that_earlier_calls_took_for_a_photo_is_no_photo_any_more(source, dataset, make_noise):
    make_noise(1, (64, 48)).save(source / "a.png")
    make_noise(2, (64, 48)).save(source / "a_mask.png")
    ingest([source], dataset)
    lines = (dataset / "manifest.jsonl").read_text()
    (dataset / "manifest.jsonl").write_text(lines.replace("photos/a_mask.png", "photos/a-mask.png"))
    left_half((64, 48)).save(source / "a-mask.png")
    (source / "a_mask.png").unlink()
    assert len(ingest([source], dataset, prune=True).photos) == 1


@pytest.mark.parametrize(
    ("alpha", "colour", "has_mask"),
    [("white", (255, 255, 255), False), ("#102030", (16, 32, 48), False), ("mask", (255, 255, 255), True)],
)
@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "P"])
def test_transparency(source, dataset, alpha, colour, has_mask, mode):
    """The left half is opaque and of a light grey, the right half transparent."""
    grey, opaque = Image.new("L", (64, 48), 200), left_half((64, 48))
    if mode == "I;16":
        values = np.where(np.asarray(opaque) > 0, 200 * 257, 0).astype(np.uint16)
        Image.fromarray(values).save(source / "a.png", transparency=0)
    elif mode == "P":
        picture = Image.fromarray(np.where(np.asarray(opaque) > 0, 1, 0).astype(np.uint8), "P")
        picture.putpalette([0, 0, 0, 200, 200, 200])
        picture.save(source / "a.png", transparency=0)
    else:
        Image.merge(mode, [*[grey] * (len(mode) - 1), opaque]).save(source / "a.png")
    Image.new("RGBA", (64, 48), (9, 9, 9, 255)).save(source / "opaque.png")
    summary = ingest([source], dataset, alpha=alpha, image_format="webp", quality=100)
    photo, whole = summary.photos
    assert summary.num_transparent == 1
    assert not whole.mask
    with Image.open(dataset / photo.file) as stored:
        pixels = np.asarray(stored.convert("RGB")).astype(int)
    # lossy, and the colours are subsampled
    assert np.abs(pixels[:, :28] - 200).max() <= 6
    assert np.abs(pixels[:, 36:] - colour).max() <= 6
    assert bool(photo.mask) == has_mask
    if has_mask:
        assert np.array_equal(stored_mask(dataset, photo), np.asarray(opaque))


def test_a_mask_file_goes_before_the_alpha_which_is_turned_and_shrunk_as_well(source, dataset):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    for name in ("a", "b"):
        picture = Image.new("RGBA", (240, 120), "red" if name == "a" else "blue")
        picture.putalpha(left_half((240, 120)))
        picture.save(source / f"{name}.png", exif=exif)
    Image.new("L", (120, 240), 7).save(source / "b-mask.png")
    first, second = ingest([source], dataset, alpha="mask", max_megapixels=0.0128).photos
    mask = stored_mask(dataset, first)
    assert ((mask[:80] == 255).all(), (mask[80:] == 0).all()) == (True, True)
    assert (stored_mask(dataset, second) == 7).all()


@pytest.mark.parametrize("alpha", ["blurple", "#12", "#10203040", ""])
def test_a_colour_that_is_none_is_refused(source, dataset, make_noise, alpha):
    make_noise(1).save(source / "a.png")
    with pytest.raises(UserError, match="is neither a colour nor mask; use white, black, '#808080' or mask"):
        ingest([source], dataset, alpha=alpha)


def test_a_row_is_the_mean_over_the_area_of_each_latent_pixel():
    values = np.random.default_rng(3).integers(0, 256, (40, 60)).astype(np.uint8)
    mask = Image.fromarray(values)
    crop = Crop((4, 8, 52, 40), False)
    row = mask_row(mask, crop, Bucket(24, 16), 2)
    assert row.shape == (1, 8, 12)
    blocks = values[8:40, 4:52].reshape(8, 4, 12, 4).mean((1, 3)) / 255
    np.testing.assert_allclose(row[0], blocks, atol=1e-6)
    flipped = mask_row(mask, Crop(crop.box, True), Bucket(24, 16), 2)
    assert np.array_equal(flipped, row[..., ::-1])
    white = mask_row(Image.new("L", (60, 40), 255), Crop((1, 2, 54, 39), False), Bucket(48, 40), 2)
    assert (white == 1).all()
    # of parts of pixels, and of a crop smaller than the latents
    third = mask_row(Image.fromarray(values[:1, :4]), Crop((0, 0, 4, 1), False), Bucket(6, 2), 2)
    a, b, c, d = values[0, :4] / 255
    means = ((a + b / 3) * 0.75, (b + c) * 0.5, (c / 3 + d) * 0.75)
    np.testing.assert_allclose(third[0, 0], means, atol=1e-6)


@pytest.fixture
def masked(tmp_path, fakes, make_noise):
    """(dataset folder, cache, samples) of photos that are their own masks, the last one without."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate(((96, 64), (64, 96), (80, 80), (96, 64))):
        photo = make_noise(number, size, "L")
        photo.convert("RGB").save(folder / f"{number}.png")
        if number < 3:
            photo.save(folder / f"{number}-mask.png")
    dataset = tmp_path / "dataset"
    ingest([folder], dataset)
    vae, text = fakes.FakeVae(), fakes.FakeTextEncoder()
    samples = with_masks(fakes.plan(dataset, vae, text, dtype="float32"), vae.factor, "float32")
    with Cache(tmp_path / "cache", "float32") as cache:
        fill_texts(cache, [], text, 4)
        fill_latents(cache, dataset, samples, vae, 4)
        yield dataset, cache, samples


def test_cached_masks_are_cropped_and_mirrored_as_their_photos(masked, fakes):
    """FakeVae's latents are means of blocks, so a photo that is its own mask has the mask as its first channel."""
    dataset, cache, samples = masked
    keys = {key for sample in samples for key in sample.mask_keys}
    assert len(keys) > 5
    assert fill_masks(cache, dataset, samples, 8) == len(keys)
    assert fill_masks(cache, dataset, samples, 8) == 0
    assert any(crop.is_flipped for sample in samples for crop in sample.crops)
    for sample in samples[:3]:
        for latent_key, mask_key in zip(sample.latent_keys, sample.mask_keys, strict=True):
            mean, mask = cache.read([latent_key])[0, 0], cache.read([mask_key])[0, 0]
            # the photo is resized to 8 px a latent before, by LANCZOS, which takes a little of its surroundings
            assert np.corrcoef(mean.ravel(), mask.ravel())[0, 1] > 0.85
            assert np.corrcoef(mean[:, ::-1].ravel(), mask.ravel())[0, 1] < 0.6


def test_batches_of_a_run_have_masks_of_one_shape(masked, fakes):
    dataset, cache, samples = masked
    fill_masks(cache, dataset, samples, 8)
    # a text row for its shape; the first and the last photo have the same bucket
    empty = empty_text_key("text-a", "float32")
    last = dataclasses.replace(samples[3].photo, settings=PhotoSettings(loss_scale=2))
    samples = [*samples[:3], dataclasses.replace(samples[3], photo=last)]

    def batch(indices, **settings):
        refs = tuple(SampleRef(samples[i].sample_id, i, 0, 1, EMPTY_CAPTION) for i in indices)
        return load_batch(
            RowSource(cache, samples, empty, lambda rows, sizes: rows, **settings), MicroBatch(samples[0].bucket, refs)
        )

    plain = batch([0, 3])
    assert plain.mask_B1HW is None
    assert plain.scales_B is None
    both = batch([0, 3], has_masks=True, has_scales=True, mask_weight=0.25)
    inside = torch.from_numpy(cache.read([samples[0].mask_keys[1]]))[0]
    torch.testing.assert_close(both.mask_B1HW[0], 0.25 + 0.75 * inside)
    assert torch.equal(both.mask_B1HW[1], torch.ones_like(inside))
    assert both.scales_B.tolist() == [1.0, 2.0]
    alone = batch([3], has_masks=True)
    assert (alone.mask_B1HW.shape[0], float(alone.mask_B1HW.min())) == (1, 1.0)


def test_a_stored_mask_that_changed_is_refused_even_if_its_rows_are_cached(masked):
    dataset, cache, samples = masked
    fill_masks(cache, dataset, samples, 8)
    path = dataset / samples[1].photo.mask
    path.write_bytes((dataset / samples[0].photo.mask).read_bytes())
    with pytest.raises(UserError, match=rf"{path.name} changed since it was prepared"):
        fill_masks(cache, dataset, samples, 8)
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name} cannot be read .*run `safelight prepare` again"):
        fill_masks(cache, dataset, samples, 8)


def test_another_mask_has_other_rows_and_a_damaged_row_is_made_anew(masked):
    dataset, cache, samples = masked
    other = dataclasses.replace(samples[0].photo, mask_sha256="0" * 64)
    (changed,) = with_masks([dataclasses.replace(samples[0], photo=other)], 8, "float32")
    assert not set(changed.mask_keys) & set(samples[0].mask_keys)
    fill_masks(cache, dataset, samples, 8)
    before = cache.read(list(samples[0].mask_keys))
    for shard in (cache.path / "shards").glob("mask-*"):
        content = shard.read_bytes()
        shard.write_bytes(bytes(len(content) // 2) + content[len(content) // 2 :])
    assert fill_masks(cache, dataset, samples, 8) > 0
    assert np.array_equal(cache.read(list(samples[0].mask_keys)), before)


def test_the_manifest_holds_the_mask_and_its_hash(source, dataset, make_noise):
    make_noise(1, (64, 48)).save(source / "a.png")
    left_half((64, 48)).save(source / "a-mask.png")
    (photo,) = ingest([source], dataset).photos
    row = json.loads((dataset / "manifest.jsonl").read_text())
    assert (row["mask"], row["mask_sha256"]) == (photo.mask, photo.mask_sha256)
    assert photo.mask == f"masks/a-{photo.mask_sha256[:8]}.png"
