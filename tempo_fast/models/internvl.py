"""InternVL3 (arXiv 2504.10479) through transformers' own classes: the checkpoints whose names end in ``-hf``.

Each frame is squeezed into one square (448 pixels, 256 tokens) and named in the text: "Frame1: <img>...</img>".
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tempo_fast.errors import InputError
from tempo_fast.models.family import Family, Grid, VideoGeometry
from tempo_fast.models.frames import FrameFamily, square

# what the towers were trained with, and what transformers' conversion writes beside the weights
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InternVL(FrameFamily):
    name = "internvl"
    model_class = "InternVLForConditionalGeneration"
    vision_lora_targets = (
        r".*vision_tower\.encoder\.layer\.\d+\.(attention\.((q|k|v)_proj|projection_layer)|mlp\.fc[12])"
    )
    vision_modules = ("vision_tower", "multi_modal_projector")
    placeholder = "<IMG_CONTEXT>"

    def geometry(self, config: Any) -> VideoGeometry:
        vision = config.vision_config
        side, patch = square(config, vision.image_size, vision.patch_size)
        merge = round(1 / config.downsample_ratio)
        if merge * config.downsample_ratio != 1 or side % (patch * merge):
            raise InputError(
                f"model.path: frames of {side} pixels in patches of {patch} cannot be merged by a downsample_ratio of"
                f" {config.downsample_ratio}"
            )
        return VideoGeometry(
            patch=patch,
            merge=merge,
            temporal=1,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            sampling="hf_internvl",
            side=side,
            frame_tokens=(side // patch // merge) ** 2,
        )

    def _slot(self, config: Any, grid: Grid) -> str:
        frame = f"<img>{self.placeholder * self.geometry(config).frame_tokens}</img>"
        return "\n".join(f"Frame{i}: {frame}" for i in range(1, grid.t + 1))

    def _frames(self, model: Any, frames: Tensor) -> Tensor:
        return model.get_image_features(frames, return_dict=True).pooler_output.flatten(0, 1)


FAMILY: Family = InternVL()
