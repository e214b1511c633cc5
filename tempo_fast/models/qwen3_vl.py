"""Qwen3-VL (arXiv 2511.21631): a text timestamp before every temporal patch, and visual features that are also added to
the first decoder layers (DeepStack, arXiv 2406.04334)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tempo_fast.models.family import Family, Grid, Timing, VideoGeometry, unwrap
from tempo_fast.models.qwen2_vl import Qwen2VL, vision_positions

_START, _END = "<|vision_start|>", "<|vision_end|>"


class Qwen3VL(Qwen2VL):
    name = "qwen3_vl"
    model_class = "Qwen3VLForConditionalGeneration"
    vision_lora_targets = r".*visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])"
    timed = True

    def geometry(self, config: Any) -> VideoGeometry:
        vision, half = config.vision_config, (0.5, 0.5, 0.5)
        return VideoGeometry(
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal=vision.temporal_patch_size,
            mean=half,
            std=half,
        )

    def _slots(
        self, tokenizer: Any, config: Any, rendered: str, grids: Sequence[Grid], times: Sequence[Timing]
    ) -> tuple[str, list[Tensor]]:
        """Each temporal patch is an image of its own behind "<0.5 seconds>".

        The template's wrapper around the video goes, as in the processor the model was released with (transformers
        4.57); that of transformers 5.10 and later leaves it around all patches.
        """
        geometry = self.geometry(config)
        pad = tokenizer.convert_ids_to_tokens(config.video_token_id)
        slot = f"{_START}{pad}{_END}"
        pieces = rendered.split(slot if rendered.count(slot) == len(grids) else pad)
        out, runs = [pieces[0]], []
        for grid, time, piece in zip(grids, times, pieces[1:], strict=True):
            seconds = patch_seconds(time.seconds, geometry.temporal)
            if len(seconds) != grid.t:
                raise ValueError(f"qwen3_vl: times of {len(time.seconds)} frames for {grid.t} temporal patches")
            out += [f"<{s:.1f} seconds>{slot}" for s in seconds]
            out.append(piece)
            runs += [vision_positions(Grid(1, grid.h, grid.w), geometry.merge)] * grid.t
        return "".join(out), runs

    def encode_vision(self, model: nn.Module, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """[G, D * (1 + n)]: what enters the language model, then what is added behind its first n layers."""
        out = self._vision(model, pixel_values, grids)
        # one tensor for all videos, or one each (transformers 5.23)
        deep = [f if isinstance(f, Tensor) else torch.cat(tuple(f)) for f in out.deepstack_features]
        return torch.cat([torch.cat(tuple(out.pooler_output)), *deep], dim=-1)

    def embed(self, model: nn.Module, input_ids: Tensor, visual: Tensor, features: Tensor | None) -> Tensor:
        if features is not None:
            features = features[:, : unwrap(model).config.text_config.hidden_size]
        return super().embed(model, input_ids, visual, features)

    def _deeper(self, embeds: Tensor, visual: Tensor, features: Tensor | None) -> dict[str, Any]:
        if features is None:
            return {}
        width = embeds.shape[-1]
        return {"visual_pos_masks": visual, "deepstack_visual_embeds": list(features.split(width, dim=-1)[1:])}


def patch_seconds(seconds: Sequence[float], temporal: int) -> list[float]:
    """The time of each temporal patch: the middle of its first and last frame; the last frame fills up the last one."""
    last = len(seconds) - 1
    return [(seconds[i] + seconds[min(i + temporal - 1, last)]) / 2 for i in range(0, len(seconds), temporal)]


FAMILY: Family = Qwen3VL()
