"""A CLIP and detectors with random weights, small enough for tests, saved with real processors and a real tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.trainer.captioning.small_captioners import lively

ROOT = Path(__file__).resolve().parents[3]
NAMES = {0: "N/A", 1: "dog", 2: "cat", 3: "spoon", 4: "ghost"}
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
DETR = {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 7},
}
RT_DETR = {
    **{"d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 24, 32], "feat_strides": [8, 16, 32]},
    **{"encoder_ffn_dim": 48, "encoder_attention_heads": 2, "decoder_layers": 2, "decoder_ffn_dim": 48},
    **{"decoder_attention_heads": 2, "num_queries": 9, "num_denoising": 0, "decoder_in_channels": [32, 32, 32]},
    "hidden_expansion": 0.5,
}


def save_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "safelight" / "tiny" / "tokenizer")
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            **SIZE,
            **{"vocab_size": len(tokenizer), "max_position_embeddings": 16},
            **{"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id},
        },
        vision_config={**SIZE, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    model = lively(CLIPModel(config), 4)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _save(folder, model, CLIPProcessor(images, tokenizer))


def save_yolos(folder: Path) -> Path:
    from transformers import YolosConfig, YolosForObjectDetection
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    torch.manual_seed(0)
    config = YolosConfig(**SIZE, image_size=[32, 48], patch_size=8, num_detection_tokens=7, id2label=NAMES)
    images = YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64})
    return _save(folder, lively(YolosForObjectDetection(config), 6), images)


def save_detr(folder: Path) -> Path:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = DetrConfig(**DETR, backbone_config=backbone, use_timm_backbone=False, backbone=None, id2label=NAMES)
    images = DetrImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64})
    return _save(folder, lively(DetrForObjectDetection(config), 3), images)


def save_rt_detr(folder: Path) -> Path:
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig
    from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(**RT_DETR, backbone_config=backbone, id2label=NAMES)
    images = RTDetrImageProcessorPil(size={"height": 64, "width": 64})
    return _save(folder, lively(RTDetrForObjectDetection(config), 3), images)


def save_d_fine(folder: Path) -> Path:
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config
    from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

    torch.manual_seed(0)
    backbone = HGNetV2Config(
        **{"stem_channels": [3, 8, 8], "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        **{"stage_in_channels": [8, 8, 16, 24], "stage_mid_channels": [4, 8, 8, 8]},
        **{"stage_out_channels": [8, 16, 24, 32], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [1] * 4},
        out_features=["stage2", "stage3", "stage4"],
    )
    config = DFineConfig(**RT_DETR, backbone_config=backbone, id2label=NAMES)
    images = RTDetrImageProcessorPil(size={"height": 64, "width": 64})
    return _save(folder, lively(DFineForObjectDetection(config), 3), images)


def _save(folder: Path, model, processor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


SAVERS = {
    "clip": save_clip,
    "yolos": save_yolos,
    "detr": save_detr,
    "rt_detr": save_rt_detr,
    "d_fine": save_d_fine,
}
