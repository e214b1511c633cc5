"""Qwen2-VL (arXiv 2409.12191) through transformers' own classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tempo_fast.errors import InputError
from tempo_fast.models.family import CLIP_MEAN, CLIP_STD, Grid, Prompt, Timing, VideoGeometry, unwrap


class Qwen2VL:
    """Its successors inherit what they share with it."""

    name = "qwen2_vl"
    model_class = "Qwen2VLForConditionalGeneration"
    """In transformers."""
    lora_targets = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
    vision_lora_targets = r".*visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
    timed = False

    def load(self, path: str, dtype: torch.dtype) -> nn.Module:
        import transformers

        try:
            kind = getattr(transformers, self.model_class)
            return kind.from_pretrained(path, dtype=dtype, local_files_only=True)
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

    def build_prompt(
        self,
        tokenizer: Any,
        config: Any,
        text: str,
        grids: Sequence[Grid],
        times: Sequence[Timing] | None = None,
    ) -> Prompt:
        content: list[dict[str, str]] = [{"type": "video"} for _ in grids]
        content.append({"type": "text", "text": text})
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
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
        attention_mask: Any,
        visual: Tensor,
        features: Tensor | None,
        cache: Any | None = None,
    ) -> Tensor:
        embeds = self.embed(model, input_ids, visual, features)
        out = unwrap(model).model.language_model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **self._deeper(embeds, visual, features),
        )
        return out.last_hidden_state

    def _deeper(self, embeds: Tensor, visual: Tensor, features: Tensor | None) -> dict[str, Any]:
        """What the language model takes of the features beside its input."""
        return {}

    def new_cache(self, model: nn.Module) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=unwrap(model).config.get_text_config())

    def generate_model(self, model: nn.Module) -> Any:
        return unwrap(model)

    def model_positions(self, position_ids: Tensor) -> Tensor:
        return position_ids

    def head(self, model: nn.Module) -> nn.Module:
        return unwrap(model).lm_head

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return unwrap(model).model.visual


def vision_positions(grid: Grid, merge: int, interval: float | Tensor = 1) -> Tensor:
    """M-RoPE positions [3, n] of one video, from 0: one step per merged row and merged column, ``interval`` (rounded
    down) per temporal patch."""
    t = (torch.arange(grid.t) * interval).long()
    h, w = torch.arange(grid.h // merge), torch.arange(grid.w // merge)
    return torch.stack(torch.meshgrid(t, h, w, indexing="ij")).reshape(3, -1)


FAMILY = Qwen2VL()
