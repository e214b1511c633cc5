"""Qwen2-VL (arXiv 2409.12191) through transformers' own classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tempo_fast.errors import InputError
from tempo_fast.models.family import CLIP_MEAN, CLIP_STD, Grid, Prompt, VideoGeometry, unwrap


class Qwen2VL:
    name = "qwen2_vl"
    lora_targets = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
    vision_lora_targets = r".*visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"

    def load(self, path: str, dtype: torch.dtype) -> nn.Module:
        from transformers import Qwen2VLForConditionalGeneration

        try:
            return Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=dtype, local_files_only=True)
        except (OSError, ValueError) as e:
            raise InputError(f"model.path: {path} cannot be loaded ({str(e).splitlines()[0]})") from e

    def geometry(self, config: Any) -> VideoGeometry:
        vision = config.vision_config
        return VideoGeometry(
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal=vision.temporal_patch_size,
            mean=CLIP_MEAN,
            std=CLIP_STD,
        )

    def build_prompt(self, tokenizer: Any, config: Any, text: str, grids: Sequence[Grid]) -> Prompt:
        content: list[dict[str, str]] = [{"type": "video"} for _ in grids]
        content.append({"type": "text", "text": text})
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        pad, geometry = config.video_token_id, self.geometry(config)
        if ids.count(pad) != len(grids):
            raise InputError(
                f"model.path: the chat template wrote {ids.count(pad)} video slots for {len(grids)} videos"
            )
        out: list[int] = []
        positions: list[Tensor] = []
        start, pending, grid_iter = 0, 0, iter(grids)

        def text_run() -> None:
            nonlocal start, pending
            positions.append(torch.arange(start, start + pending).expand(3, -1))
            start, pending = start + pending, 0

        for token in ids:
            if token != pad:
                out.append(token)
                pending += 1
                continue
            text_run()
            grid = next(grid_iter)
            run = vision_positions(grid, geometry.merge) + start
            out.extend([pad] * run.shape[1])
            positions.append(run)
            # The pretraining rule: text resumes after the largest position on any axis. transformers 5 advances by
            # the spatial size only, which puts the text of a long video inside it.
            start = int(run.max()) + 1
        text_run()
        input_ids = torch.tensor(out)
        return Prompt(input_ids, torch.cat(positions, dim=1), input_ids == pad, list(grids))

    def answer_ids(self, tokenizer: Any, answer: str) -> list[int]:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*ids, tokenizer.convert_tokens_to_ids("<|im_end|>")]

    def encode_vision(self, model: nn.Module, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        grid_thw = torch.tensor([tuple(g) for g in grids], device=pixel_values.device)
        out = unwrap(model).model.get_video_features(pixel_values, grid_thw, return_dict=True)
        return torch.cat(tuple(out.pooler_output), dim=0)

    def embed(self, model: nn.Module, input_ids: Tensor, visual: Tensor, features: Tensor | None) -> Tensor:
        embeds = unwrap(model).get_input_embeddings()(input_ids)
        if features is None:
            return embeds
        return embeds.masked_scatter(visual.unsqueeze(-1), features.to(embeds))

    def hidden_states(
        self,
        model: nn.Module,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        visual: Tensor,
        features: Tensor | None,
        cache: Any | None = None,
    ) -> Tensor:
        out = unwrap(model).model.language_model(
            inputs_embeds=self.embed(model, input_ids, visual, features),
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return out.last_hidden_state

    def new_cache(self, model: nn.Module) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=unwrap(model).config.get_text_config())

    def generate_model(self, model: nn.Module) -> Any:
        return unwrap(model)

    def head(self, model: nn.Module) -> nn.Module:
        return unwrap(model).lm_head

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return unwrap(model).model.visual


def vision_positions(grid: Grid, merge: int) -> Tensor:
    """M-RoPE positions [3, G] of one video, from 0: one step per temporal patch, merged row and merged column."""
    t, h, w = torch.arange(grid.t), torch.arange(grid.h // merge), torch.arange(grid.w // merge)
    return torch.stack(torch.meshgrid(t, h, w, indexing="ij")).reshape(3, -1)


FAMILY = Qwen2VL()
