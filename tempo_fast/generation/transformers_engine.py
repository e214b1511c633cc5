"""The embedded default: transformers' own ``generate``, batched, with our positions and our visual features.

Shapes: B requests, L tokens of the longest prompt (left-padded), V vocabulary, G visual tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tempo_fast.config import GenerationConfig
from tempo_fast.files import digest
from tempo_fast.generation.base import Request, request_identity, sampling_provenance
from tempo_fast.models.family import Prompt
from tempo_fast.models.load import Bundle
from tempo_fast.runtime.progress import progress
from tempo_fast.trees.layout import prompt_of
from tempo_fast.trees.vision import FeatureCache

# padded prompt tokens of one batch: bounds the key-value cache of long videos
MAX_BATCH_TOKENS = 65536


class TransformersEngine:
    """Answers with a loaded model; adapters that are on take part.

    Explicit M-RoPE positions go in (text resumes after the largest position on any axis, the pretraining rule), and
    ``generate`` continues them from the last token on all axes. Every request draws from a generator of its own, seeded
    by (seed, request), so that an answer does not depend on its batch and torch's global generator is left alone.
    """

    def __init__(
        self, config: GenerationConfig, bundle: Bundle, reader: Any, features: FeatureCache | None, seed: int
    ) -> None:
        self.config, self.bundle, self.reader, self.seed = config, bundle, reader, seed
        self.features = features if features is not None else FeatureCache()

    def provenance(self) -> dict[str, Any]:
        """Engine, checkpoint, adapter weights if any, dtype and sampling parameters."""
        return {
            "engine": "transformers",
            "model": self.bundle.digest,
            "adapter": adapter_digest(self.bundle.model),
            "dtype": str(self.bundle.dtype).removeprefix("torch."),
            **sampling_provenance(self.config, self.seed),
        }

    def generate(self, requests: Sequence[Request], desc: str = "") -> list[str]:
        """See base.Engine."""
        b = self.bundle
        prompts = [prompt_of(b.family, b.tokenizer, b.config, r.prompt, r.plans) for r in requests]
        self._encode_clips(requests)
        # prompts of like length pad little, and with videos the length of the answer goes with that of the prompt
        order = sorted(range(len(requests)), key=lambda i: (-len(prompts[i].input_ids), i))
        texts = [""] * len(requests)
        bar = progress(len(requests), desc, "answer") if desc else None
        for batch in self._batches(order, prompts):
            answers = self._batch([requests[i] for i in batch], [prompts[i] for i in batch])
            for i, text in zip(batch, answers, strict=True):
                texts[i] = text
            if bar is not None:
                bar.update(len(batch))
        if bar is not None:
            bar.close()
        return texts

    def _encode_clips(self, requests: Sequence[Request]) -> None:
        """Fill the feature cache for files of which several clips are shown, each file decoded once."""
        if not hasattr(self.reader, "decoder"):
            return
        b = self.bundle
        groups: dict[str, dict[str, Any]] = {}
        for plan in (plan for r in requests for plan in r.plans):
            groups.setdefault(plan.path, {})[plan.key] = plan
        for plans in (list(group.values()) for group in groups.values()):
            if len(plans) > 1:
                self.features.features(b.family, b.model, self.reader, plans, together=True)

    def _batches(self, order: Sequence[int], prompts: Sequence[Prompt]) -> list[list[int]]:
        batches: list[list[int]] = []
        for i in order:
            last = batches[-1] if batches else None
            # sorted: the first of a batch is its longest
            if last and len(last) < self.config.batch_size:
                if (len(last) + 1) * len(prompts[last[0]].input_ids) <= MAX_BATCH_TOKENS:
                    last.append(i)
                    continue
            batches.append([i])
        return batches

    @torch.no_grad()
    def _batch(self, requests: Sequence[Request], prompts: Sequence[Prompt]) -> list[str]:
        from transformers import GenerationConfig as HFGenerationConfig
        from transformers import LogitsProcessorList

        b, device = self.bundle, self.bundle.device
        model = b.family.generate_model(b.model)
        pad = b.tokenizer.pad_token_id if b.tokenizer.pad_token_id is not None else b.tokenizer.eos_token_id
        ids, positions, mask, visual = (x.to(device) for x in left_pad(prompts, pad))
        plans = [plan for r in requests for plan in r.plans]
        # one by one: an answer must not depend on what an interrupted run had cached
        features = self.features.features(b.family, b.model, self.reader, plans, together=False)
        limits = [r.max_new_tokens or self.config.max_new_tokens for r in requests]
        stops = stop_tokens(b)
        processors = LogitsProcessorList()
        if self.config.temperature > 0:
            seeds = [int(digest([self.seed, request_identity(r)])[:15], 16) for r in requests]
            processors.append(PrivateSampling(self.config.temperature, seeds))
        mode = model.training
        model.eval()
        try:
            # all of the prompt but its last token, by the forward that every family has: ``generate`` takes no features
            # that enter deeper layers
            cache = b.family.new_cache(b.model)
            b.family.hidden_states(
                b.model, ids[:, :-1], positions[..., :-1], mask[:, :-1], visual[:, :-1], features, cache
            )
            out = model.generate(
                input_ids=ids,
                past_key_values=cache,
                position_ids=b.family.model_positions(positions),
                attention_mask=mask,
                logits_processor=processors,
                generation_config=HFGenerationConfig(
                    do_sample=False,
                    num_beams=1,
                    temperature=1.0,
                    top_k=None,
                    top_p=None,
                    repetition_penalty=self.config.repetition_penalty,
                    max_new_tokens=max(limits),
                    eos_token_id=stops,
                    pad_token_id=pad,
                    use_cache=True,
                ),
            )
        finally:
            model.train(mode)
        answers = out[:, ids.shape[1] :].tolist()
        return [self._decode(a[:limit], stops) for a, limit in zip(answers, limits, strict=True)]

    def _decode(self, tokens: list[int], stops: list[int]) -> str:
        end = next((i for i, t in enumerate(tokens) if t in stops), len(tokens))
        return self.bundle.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()


class PrivateSampling:
    """Exact sampling from softmax(scores / temperature) by a greedy decoder: the largest of scores / T + Gumbel noise.

    Called by ``generate`` with input_ids [B, L] and scores [B, V]; row i draws from its own generator. The noise is
    made on the CPU, so that the draws are the same on every device.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators])
        return scores.float() / self.temperature - noise.log().to(scores.device)


def left_pad(prompts: Sequence[Prompt], pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """input_ids [B, L], position_ids [3, B, L], attention mask [B, L] int64, visual [B, L] bool; padded on the left."""
    n, longest = len(prompts), max(len(p.input_ids) for p in prompts)
    ids = torch.full((n, longest), pad)
    positions = torch.zeros((3, n, longest), dtype=torch.long)
    mask = torch.zeros((n, longest), dtype=torch.long)
    visual = torch.zeros((n, longest), dtype=torch.bool)
    for i, p in enumerate(prompts):
        start = longest - len(p.input_ids)
        ids[i, start:], positions[:, i, start:] = p.input_ids, p.position_ids
        mask[i, start:], visual[i, start:] = 1, p.visual
    return ids, positions, mask, visual


def stop_tokens(bundle: Bundle) -> list[int]:
    """The end of the turn, and whatever else the checkpoint's generation config stops at."""
    model = bundle.family.generate_model(bundle.model)
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    extra = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return sorted({bundle.family.answer_ids(bundle.tokenizer, "")[-1], *(int(t) for t in extra)})


def adapter_digest(model: torch.nn.Module) -> str | None:
    """SHA-256 of the weights of the adapters that are on; None when there are none, or none is on."""
    parts: list[Any] = []
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A") or getattr(module, "disable_adapters", False) or module.merged:
            continue
        for adapter in module.active_adapters:
            for kind in ("lora_A", "lora_B"):
                layers = getattr(module, kind)
                if adapter in layers:
                    weight = layers[adapter].weight.detach().float().cpu().contiguous()
                    parts.append([name, adapter, kind, module.scaling[adapter], _bytes_digest(weight)])
    return digest(parts) if parts else None


def _bytes_digest(tensor: Tensor) -> str:
    import hashlib

    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
