"""The embedded default: a loaded model answers, through continuous batching of our own.

transformers' ``generate_batch`` (5.23, src/transformers/generation/continuous_batching) takes token ids alone, numbers
their positions from 0 and draws from torch's global generator; it has no way in for visual features, M-RoPE positions
or seeds of single requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tempo_fast.config import GenerationConfig
from tempo_fast.files import read_json
from tempo_fast.generation.adapters import active_digest, adapter_on, refuse_adapters, saved_digest
from tempo_fast.generation.base import Request, sampling_of, sampling_provenance
from tempo_fast.generation.decoding import Answer, Decoder
from tempo_fast.generation.sampling import PrivateSampling
from tempo_fast.models.load import Bundle
from tempo_fast.runtime.progress import progress
from tempo_fast.trees.layout import prompt_of
from tempo_fast.trees.vision import FeatureCache, evaluating


class TransformersEngine:
    """Answers with a loaded model; adapters that are on take part, or ``generation.adapter`` does.

    Every request draws from a generator of its own, seeded by (seed, request), so that an answer does not depend on its
    company beyond rounding, and torch's global generator is left alone.

    Raises:
        InputError: ``generation.adapter`` is no adapter, or the model carries adapters beside it.
    """

    def __init__(
        self, config: GenerationConfig, bundle: Bundle, reader: Any, features: FeatureCache | None, seed: int
    ) -> None:
        self.config, self.bundle, self.reader, self.seed = config, bundle, reader, seed
        # an adapter may change the tower: its features are nobody else's
        self.features = features if features is not None and not config.adapter else FeatureCache()
        self._saved = None
        if config.adapter:
            refuse_adapters(bundle)
            self._saved = saved_digest(config.adapter)

    def provenance(self) -> dict[str, Any]:
        """Engine, checkpoint, adapter weights if any, dtype and sampling parameters."""
        return {
            "engine": "transformers",
            "model": self.bundle.digest,
            "adapter": self._saved or active_digest(self.bundle.model),
            "dtype": str(self.bundle.dtype).removeprefix("torch."),
            **sampling_provenance(self.config, self.seed),
        }

    def generate(self, requests: Sequence[Request], desc: str = "") -> list[str]:
        """See base.Engine."""
        texts = [""] * len(requests)
        bar = progress(len(requests), desc, "answer") if desc else None
        try:
            with adapter_on(self.bundle, self.config.adapter), evaluating(self.bundle.model):
                for answer in self.decoder(requests).run(self._answers(requests)):
                    text = self.bundle.tokenizer.decode(answer.tokens, skip_special_tokens=True)
                    texts[answer.index] = text.strip()
                    if bar is not None:
                        bar.update(1)
        finally:
            if bar is not None:
                bar.close()
        return texts

    def decoder(self, requests: Sequence[Request]) -> Decoder:
        """What runs the model over ``requests``."""
        b = self.bundle
        together = _Together(requests) if hasattr(self.reader, "decoder") else None

        def features(answers: Sequence[Answer]) -> Tensor | None:
            plans = [plan for a in answers for plan in requests[a.index].plans]
            for clips in together.take(plans) if together else ():
                self.features.features(b.family, b.model, self.reader, clips, together=True)
            # one by one: an answer must not depend on what an interrupted run had cached
            return self.features.features(b.family, b.model, self.reader, plans, together=False)

        return Decoder(b, features, stop_tokens(b), self.config.repetition_penalty, self.config.batch_size)

    def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        """In the order they enter: prompts of like length together, those about one file one after the other."""
        b = self.bundle
        out = []
        for i, r in enumerate(requests):
            prompt = prompt_of(b.family, b.tokenizer, b.config, r.prompt, r.plans, r.turns)
            s = sampling_of(self.config, self.seed, r)
            sampling = PrivateSampling(s.temperature, s.top_p, s.seed) if s.temperature > 0 else None
            key = (tuple(prompt.input_ids.tolist()), tuple(plan.key for plan in r.plans))
            out.append(Answer(i, prompt, key, s.max_new_tokens, sampling))
        return sorted(out, key=lambda a: (-math.ceil(2 * math.log2(len(a.prompt.input_ids))), a.index))


class _Together:
    """Files of which several clips are shown, each decoded once: when the first of them is needed."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        for plan in (plan for r in requests for plan in r.plans):
            self.files.setdefault(plan.path, {})[plan.key] = plan

    def take(self, plans: Sequence[Any]) -> Iterator[list[Any]]:
        """All clips of each file of ``plans`` that was not taken before and has several."""
        for plan in plans:
            clips = self.files.pop(plan.path, {})
            if len(clips) > 1:
                yield list(clips.values())


def stop_tokens(bundle: Bundle) -> list[int]:
    """The end of the turn, and whatever else the checkpoint's generation config stops at."""
    configured = getattr(
        getattr(bundle.family.generate_model(bundle.model), "generation_config", None), "eos_token_id", None
    )
    saved = Path(bundle.path) / "generation_config.json"
    if configured is None and saved.is_file():  # a bundle without weights
        configured = read_json(saved).get("eos_token_id")
    extra = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return sorted({bundle.family.answer_ids(bundle.tokenizer, "")[-1], *(int(t) for t in extra)})
