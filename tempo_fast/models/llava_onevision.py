"""LLaVA-OneVision (arXiv 2408.03326) through transformers' own classes.

Each frame is squeezed into one square (384 pixels), its features pooled to half the rows and columns (196 tokens); one
learned ``image_newline`` ends a video.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tempo_fast.models.family import Family, Grid, VideoGeometry, unwrap
from tempo_fast.models.frames import FrameFamily, square

# SigLIP's, which the checkpoints' processors are made from (the processor class' own default is CLIP's)
HALF = (0.5, 0.5, 0.5)


class LlavaOnevision(FrameFamily):
    name = "llava_onevision"
    model_class = "LlavaOnevisionForConditionalGeneration"
    vision_lora_targets = r".*vision_tower\..*layers\.\d+\.(self_attn\.((q|k|v)_proj|out_proj)|mlp\.fc[12])"
    vision_modules = ("vision_tower", "multi_modal_projector", "image_newline")
    placeholder = "<video>"

    def geometry(self, config: Any) -> VideoGeometry:
        vision = config.vision_config
        side, patch = square(config, vision.image_size, vision.patch_size)
        return VideoGeometry(
            patch=patch,
            merge=2,
            temporal=1,
            mean=HALF,
            std=HALF,
            sampling="hf_uniform",
            side=side,
            frame_tokens=math.ceil(side // patch / 2) ** 2,
        )

    def _slot(self, config: Any, grid: Grid) -> str:
        return self.placeholder * (self.geometry(config).tokens(grid) + 1)

    def _visual(self, placeholders: Tensor) -> Tensor:
        # the last of a run is the newline: a weight of the model, no feature of the video
        return placeholders & torch.cat([placeholders[1:], placeholders.new_zeros(1)])

    def _frames(self, model: Any, frames: Tensor) -> Tensor:
        # some versions of transformers append the newline here, some later
        features = model.get_video_features(frames[None], return_dict=True).pooler_output[0]
        return features[: len(frames) * self.geometry(model.config).frame_tokens]

    def embed(self, model: nn.Module, input_ids: Tensor, visual: Tensor, features: Tensor | None) -> Tensor:
        embeds = super().embed(model, input_ids, visual, features)
        inner = unwrap(model)
        newline = (input_ids == inner.config.video_token_id) & ~visual
        return torch.where(newline.unsqueeze(-1), inner.model.image_newline.to(embeds), embeds)


FAMILY: Family = LlavaOnevision()
