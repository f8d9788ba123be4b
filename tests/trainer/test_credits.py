"""The credits of a dataset's photographs reach the run's data.json."""

from dataclasses import replace
from types import SimpleNamespace

from safelight.data.photo import Credit, Photo
from safelight.trainer.loading.run_start import MAX_CREDITS, credits_of


def test_each_photograph_is_credited_once_in_the_order_of_files():
    photo = Photo("images/b.jpg", "a" * 64, 8, 8, ("x",), "s/b.jpg", "file name")
    ann, ben = Credit("Ann", "https://x.example/1"), Credit("Ben")
    photos = [replace(photo, credit=ben), photo, replace(photo, file="images/a.jpg", credit=ann)]
    photos[1] = replace(photo, file="images/c.jpg")
    # a photograph of several sizes has a sample for each
    dataset = SimpleNamespace(samples=[SimpleNamespace(photo=one) for one in (*photos, photos[0])])
    assert credits_of(dataset) == [
        {"photographer": "Ann", "page": "https://x.example/1"},
        {"photographer": "Ben", "page": ""},
    ]


def test_of_very_many_credits_the_first_are_kept():
    photo = Photo("images/0.jpg", "a" * 64, 8, 8, ("x",), "s/b.jpg", "file name", credit=Credit("Ann"))
    samples = [SimpleNamespace(photo=replace(photo, file=f"images/{number}.jpg")) for number in range(MAX_CREDITS + 1)]
    assert len(credits_of(SimpleNamespace(samples=samples))) == MAX_CREDITS
