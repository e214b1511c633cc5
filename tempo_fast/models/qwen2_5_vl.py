"""Qwen2.5-VL (arXiv 2502.13923): as Qwen2-VL, with temporal positions that follow the seconds of the video.

The tower's window attention is transformers' own; windows lie inside one video, so one call for several is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tempo_fast.models.family import Family, Grid, Timing
from tempo_fast.models.qwen2_vl import Qwen2VL, vision_positions


class Qwen25VL(Qwen2VL):
    name = "qwen2_5_vl"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    vision_lora_targets = r".*visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)"
    timed = True

    def _slots(
        self, tokenizer: Any, config: Any, rendered: str, grids: Sequence[Grid], times: Sequence[Timing]
    ) -> tuple[str, list[Tensor]]:
        """A temporal patch lies ``tokens_per_second`` * its seconds after the one before; transformers rounds down in
        float32, and the seconds are those of the sampling rate, not of single frames (arXiv 2502.13923)."""
        geometry, rate = self.geometry(config), config.vision_config.tokens_per_second
        runs = [
            vision_positions(grid, geometry.merge, rate * torch.tensor(geometry.temporal / time.fps))
            for grid, time in zip(grids, times, strict=True)
        ]
        return rendered, runs


FAMILY: Family = Qwen25VL()
