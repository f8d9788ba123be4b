"""Makes transformers' processor of a captioner: what turns photographs and a prompt into the model's inputs."""

from __future__ import annotations

from pathlib import Path

from safelight.errors import UserError
from safelight.trainer.captioning.tokenizer_file import check_vocabulary


def load_processor(staged: Path, config, values: dict[str, dict]):
    """Return the processor in a folder of checked files; its image processor works with Pillow and numpy alone.

    config: the model's. values: the content of the folder's JSON files by their names. Raises whatever transformers
    makes of files that contradict each other, ValueError for tokens that are too long, and UserError if there is no
    processor for photographs and text.
    """
    processor_class = _without_videos(_processor_class(config, values))
    processor = processor_class.from_pretrained(staged, local_files_only=True, backend="pil")
    check_vocabulary(processor.tokenizer)
    return processor


def _processor_class(config, values: dict[str, dict]) -> type:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

    files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    names = [values.get(file, {}).get("processor_class") for file in files]
    name = next((name for name in names if isinstance(name, str)), None)
    processor_class = processor_class_from_name(name) if name else None
    if processor_class is None and type(config) in PROCESSOR_MAPPING:
        processor_class = PROCESSOR_MAPPING[type(config)]
    if processor_class is None or not {"image_processor", "tokenizer"} <= set(processor_class.get_attributes()):
        raise UserError(f"models of the kind {config.model_type!r} have no processor for photographs and text")
    return processor_class


def _without_videos(processor_class: type) -> type:
    """Return a processor class that does not ask for a video processor, which needs torchvision."""
    attributes = [name for name in processor_class.get_attributes() if name != "video_processor"]
    if len(attributes) == len(processor_class.get_attributes()):
        return processor_class
    return type(processor_class.__name__, (processor_class,), {"get_attributes": classmethod(lambda cls: attributes)})
