"""Qwen2-VL (arXiv 2409.12191) through transformers' own classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tempo_fast.errors import InputError
from tempo_fast.models.base import TransformersFamily
from tempo_fast.models.family import CLIP_MEAN, CLIP_STD, Family, Grid, Prompt, Timing, VideoGeometry, unwrap


class Qwen2VL(TransformersFamily):
    """Its successors inherit what they share with it."""

    name = "qwen2_vl"
    model_class = "Qwen2VLForConditionalGeneration"
    vision_lora_targets = r".*visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"

    def geometry(self, config: Any) -> VideoGeometry:
        vision = config.vision_config
        return VideoGeometry(
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal=vision.temporal_patch_size,
            mean=CLIP_MEAN,
            std=CLIP_STD,
        )

    def build_prompt(
        self,
        tokenizer: Any,
        config: Any,
        text: str,
        grids: Sequence[Grid],
        times: Sequence[Timing] | None = None,
        turns: Sequence[tuple[str, str]] = (),
    ) -> Prompt:
        rendered = self.chat(tokenizer, text, len(grids), turns)
        pad = config.video_token_id
        found = rendered.count(tokenizer.convert_ids_to_tokens(pad))
        if found != len(grids):
            raise InputError(f"model.path: the chat template wrote {found} video slots for {len(grids)} videos")
        if (self.timed or times is not None) and len(times or ()) != len(grids):
            raise ValueError(f"{self.name}: {len(times or ())} times of frames for {len(grids)} videos")
        rendered, runs = self._slots(tokenizer, config, rendered, grids, times or ())
        out: list[int] = []
        positions: list[Tensor] = []
        start, pending, run_iter = 0, 0, iter(runs)

        def text_run() -> None:
            nonlocal start, pending
            positions.append(torch.arange(start, start + pending).expand(3, -1))
            start, pending = start + pending, 0

        for token in tokenizer(rendered, add_special_tokens=False)["input_ids"]:
            if token != pad:
                out.append(token)
                pending += 1
                continue
            text_run()
            run = next(run_iter) + start
            out.extend([pad] * run.shape[1])
            positions.append(run)
            # The pretraining rule: text resumes after the largest position on any axis. transformers 5 advances by
            # the spatial size only, which puts the text of a long video inside it.
            start = int(run.max()) + 1
        text_run()
        input_ids = torch.tensor(out)
        return Prompt(input_ids, torch.cat(positions, dim=1), input_ids == pad, list(grids))

    def _slots(
        self, tokenizer: Any, config: Any, rendered: str, grids: Sequence[Grid], times: Sequence[Timing]
    ) -> tuple[str, list[Tensor]]:
        """The chat as the model reads it, and for each visual slot in it the positions [3, n] of its tokens from 0."""
        merge = self.geometry(config).merge
        return rendered, [vision_positions(grid, merge) for grid in grids]

    def answer_ids(self, tokenizer: Any, answer: str) -> list[int]:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*ids, tokenizer.convert_tokens_to_ids("<|im_end|>")]

    def encode_vision(self, model: nn.Module, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        return torch.cat(tuple(self._vision(model, pixel_values, grids).pooler_output), dim=0)

    def _vision(self, model: nn.Module, pixel_values: Tensor, grids: Sequence[Grid]) -> Any:
        grid_thw = torch.tensor([tuple(g) for g in grids], device=pixel_values.device)
        return unwrap(model).model.get_video_features(pixel_values, grid_thw, return_dict=True)

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return unwrap(model).model.visual


def vision_positions(grid: Grid, merge: int, interval: float | Tensor = 1) -> Tensor:
    """M-RoPE positions [3, n] of one video, from 0: one step per merged row and merged column, ``interval`` (rounded
    down) per temporal patch."""
    t = (torch.arange(grid.t) * interval).long()
    h, w = torch.arange(grid.h // merge), torch.arange(grid.w // merge)
    return torch.stack(torch.meshgrid(t, h, w, indexing="ij")).reshape(3, -1)


FAMILY: Family = Qwen2VL()
