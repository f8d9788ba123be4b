"""The rows of a cache: their keys and their bytes."""

from safelight.data.cache import empty_text_key


def all_keys(samples):
    texts = {key for sample in samples for key in sample.text_keys} | {empty_text_key("text-a", "float16")}
    return sorted({key for sample in samples for key in sample.latent_keys}) + sorted(texts)


def contents(cache, keys):
    return {key: cache.read([key])[0].tobytes() for key in keys}
