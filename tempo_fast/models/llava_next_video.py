"""LLaVA-NeXT-Video through transformers' own classes.

The middle square of each frame (336 pixels) is pooled to half the rows and columns (144 tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tempo_fast.models.family import CLIP_MEAN, CLIP_STD, Family, Grid, VideoGeometry
from tempo_fast.models.frames import FrameFamily, square


class LlavaNextVideo(FrameFamily):
    name = "llava_next_video"
    model_class = "LlavaNextVideoForConditionalGeneration"
    vision_lora_targets = r".*vision_tower\..*layers\.\d+\.(self_attn\.((q|k|v)_proj|out_proj)|mlp\.fc[12])"
    vision_modules = ("vision_tower", "vision_resampler", "multi_modal_projector")
    placeholder = "<video>"
    turn_end = None

    def geometry(self, config: Any) -> VideoGeometry:
        vision, stride = config.vision_config, config.spatial_pool_stride
        side, patch = square(config, vision.image_size, vision.patch_size)
        return VideoGeometry(
            patch=patch,
            merge=stride,
            temporal=1,
            mean=CLIP_MEAN,
            std=CLIP_STD,
            sampling="hf_uniform",
            side=side,
            crop=True,
            frame_tokens=(side // patch // stride) ** 2,
        )

    def _slot(self, config: Any, grid: Grid) -> str:
        return self.placeholder * self.geometry(config).tokens(grid)

    def _continuation(self, tokenizer: Any, answer: str) -> Sequence[int]:
        # Llama's tokenizers begin a text with a space, which belongs there after "ASSISTANT:" or "[/INST]", and not
        # after ChatML's line break
        ids = super()._continuation(tokenizer, answer)
        if tokenizer.eos_token != "<|im_end|>":
            return ids
        line = super()._continuation(tokenizer, "\n")
        after = super()._continuation(tokenizer, "\n" + answer)
        return after[len(line) :]

    def _frames(self, model: Any, frames: Tensor) -> Tensor:
        return model.get_video_features(frames[None], return_dict=True).pooler_output[0].flatten(0, -2)


FAMILY: Family = LlavaNextVideo()
