"""The small Qwen2-VL: its configuration, and a fast way through its vision tower.

Shape legend: N frame pairs, P patches of a pair, D width of the vision tower, H hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tempo_fast.tinyworld.tasks import Example, Rows, patchify


def build_config(tokenizer):
    """Configuration of the base model for this vocabulary: about 3 M parameters."""
    from transformers import Qwen2VLConfig

    token = tokenizer.convert_tokens_to_ids
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            # half of the rotary pairs tell time: order is what this model is made for
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 3,
            "embed_dim": 128,
            "hidden_size": 192,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def build_model(tokenizer, seed: int):
    """A freshly initialised model; the seed decides its weights and the global generator is left as it was."""
    from transformers import Qwen2VLForConditionalGeneration

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(build_config(tokenizer))
    return model


def see(model, patches: Tensor, h: int, w: int) -> Tensor:
    """Vision features [N, P/4, H] of frame pairs [N, P, 1176], all pairs as one batch.

    Equal to the tower's own forward, which on a CPU attends to one frame pair after another.
    """
    tower = model.model.visual
    n, p, _ = patches.shape
    x = F.linear(patches, tower.patch_embed.proj.weight.flatten(1))
    # rows and columns in the order of the patches: 2x2 squares side by side
    rows, columns = (
        g.view(h // 2, 2, w // 2, 2).transpose(1, 2).reshape(-1)
        for g in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    )
    cos, sin = tower.rotary_pos_emb(x, torch.stack([rows, columns], dim=-1))
    cos, sin = cos.view(p, 1, -1), sin.view(p, 1, -1)
    for block in tower.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).view(n, p, 3, attention.num_heads, -1)
        q, k, v = qkv.unbind(2)
        q, k = (a * cos + _rotate(a) * sin for a in (q, k))
        out = F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)))
        x = x + attention.proj(out.transpose(1, 2).reshape(n, p, -1))
        x = x + block.mlp(block.norm2(x))
    return tower.merger(x).view(n, p // 4, -1)


def _rotate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def features_of(model, examples: Sequence[Example]) -> Tensor:
    """Visual features of all examples in reading order [G, H]; stored features are used where an example has them."""
    pieces: list[Tensor | None] = []
    todo: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    for example in examples:
        if example.features is not None:
            pieces += [f.float() for f in example.features]
            continue
        for video, (_, h, w) in zip(example.videos, example.shapes(), strict=True):
            todo.setdefault((h, w), []).append((len(pieces), video))
            pieces.append(None)
    for (h, w), videos in todo.items():
        patches = [patchify(v) for _, v in videos]
        seen = see(model, torch.cat(patches), h, w).split([p.shape[0] for p in patches])
        for (place, _), piece in zip(videos, seen, strict=True):
            pieces[place] = piece.flatten(0, 1)
    return torch.cat([p for p in pieces if p is not None])


def response_logits(model, rows: Rows, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [n, V], targets [n], row [n]) at the positions that predict the responses."""
    embeds = model.get_input_embeddings()(rows.ids)
    embeds = embeds.masked_scatter(rows.visual.unsqueeze(-1), features.to(embeds.dtype))
    # rows are padded on the right, so the plain causal mask is enough
    hidden = model.model.language_model(inputs_embeds=embeds, position_ids=rows.positions, use_cache=False)
    where = rows.targets != -100
    return model.lm_head(hidden.last_hidden_state[where]), rows.targets[where], where.nonzero()[:, 0]
