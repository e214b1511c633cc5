"""vLLM's offline engine: continuous batching on a GPU. An extra; needs the package ``vllm``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tempo_fast.config import GenerationConfig
from tempo_fast.errors import InputError
from tempo_fast.generation.adapters import FILES, rank_of, refuse_adapters, saved_digest
from tempo_fast.generation.base import RefusedRequest, Request, sampling_of, sampling_provenance
from tempo_fast.models.load import Bundle

# most videos of one prompt: the two clips of a caption window
MAX_VIDEOS = 2
# what vLLM knows (vllm-project/vllm 0.32.0: vllm/config/lora.py, MaxLoRARanks)
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# a prompt, or a video in it, that is too long (vllm/v1/engine/input_processor.py, vllm/renderers/params.py)
_TOO_LONG = re.compile(r"maximum model length|maximum context length|pre-allocated encoder cache", re.IGNORECASE)


class VLLMEngine:
    """Answers with a vLLM engine of its own, loaded from the bundle's directory; with ``generation.adapter`` where set.

    Frames are handed over decoded and resized, so that vLLM's processor keeps sampling and size as planned; positions
    are vLLM's own, which follow the pretraining rule. The bundle's own weights are not used: it may be loaded without.

    Raises:
        InputError: vLLM is not installed, the bundle's model carries adapters, its family sees whole frames or is told
            when they are shown, or ``generation.adapter`` is none that vLLM takes.
    """

    def __init__(self, config: GenerationConfig, bundle: Bundle, reader: Any, seed: int) -> None:
        if bundle.geometry.side or bundle.family.timed:
            raise InputError(
                f"generation.engine: vllm writes the prompts of {bundle.family.name} itself, which are not checked to"
                " be as here; use transformers"
            )
        try:
            from vllm import LLM
        except ImportError as e:
            raise InputError(
                "generation.engine: vllm was asked for and is not installed; pip install 'tempo-fast[vllm]'"
            ) from e
        if hasattr(bundle.model, "peft_config") and not config.adapter:
            raise InputError(
                "generation.engine: vllm reads its weights from files; merge the adapters, or save them and name the"
                " folder in generation.adapter"
            )
        self.config, self.bundle, self.reader, self.seed = config, bundle, reader, seed
        more: dict[str, Any] = {}
        self._saved = self._lora = None
        if config.adapter:
            from vllm.lora.request import LoRARequest

            refuse_adapters(bundle)
            self._saved = saved_digest(config.adapter)
            more = {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank(config.adapter)}
            self._lora = LoRARequest("generation", 1, config.adapter)
        self.llm = LLM(
            model=bundle.path,
            dtype=str(bundle.dtype).removeprefix("torch."),
            seed=seed,
            max_num_seqs=config.batch_size,
            limit_mm_per_prompt={"video": MAX_VIDEOS, "image": 0},
            mm_processor_kwargs={"do_resize": False, "do_sample_frames": False},
            enable_prefix_caching=True,
            **more,
        )

    def provenance(self) -> dict[str, Any]:
        """Engine and its version, checkpoint, adapter weights if any, dtype and sampling parameters."""
        import vllm

        return {
            "engine": "vllm",
            "version": vllm.__version__,
            "model": self.bundle.digest,
            **({"adapter": self._saved} if self._saved else {}),
            "dtype": str(self.bundle.dtype).removeprefix("torch."),
            **sampling_provenance(self.config, self.seed),
        }

    def generate(self, requests: Sequence[Request], desc: str = "") -> list[str]:
        """See base.Engine; the progress bar is vLLM's. Every request has a seed of its own."""
        from vllm import SamplingParams

        from tempo_fast.generation.transformers_engine import stop_tokens

        stops = stop_tokens(self.bundle)
        inputs, parameters = [], []
        for r in requests:
            inputs.append(self._input(r))
            s = sampling_of(self.config, self.seed, r)
            parameters.append(
                SamplingParams(
                    temperature=s.temperature,
                    top_p=s.top_p if s.temperature > 0 else 1.0,
                    repetition_penalty=s.repetition_penalty,
                    max_tokens=s.max_new_tokens,
                    seed=s.seed >> 28,  # 32 bits
                    stop_token_ids=stops,
                )
            )
        texts, reasons = self._answers(inputs, parameters, bool(desc))
        if reasons:
            raise RefusedRequest(reasons, texts)
        return texts

    def _answers(self, inputs: list[Any], parameters: list[Any], bar: bool) -> tuple[list[str], dict[int, str]]:
        """Texts, and why requests are refused. vLLM refuses all for one and does not say which: halves are asked."""
        try:
            outputs = self.llm.generate(inputs, parameters, use_tqdm=bar, lora_request=self._lora)
        except ValueError as e:
            if not _TOO_LONG.search(str(e)):
                raise
            if len(inputs) == 1:
                return [""], {0: f"generation.engine: vllm refuses ({' '.join(str(e).split())})"}
            half = len(inputs) // 2
            texts, reasons = self._answers(inputs[:half], parameters[:half], bar)
            more, why = self._answers(inputs[half:], parameters[half:], bar)
            return texts + more, reasons | {half + k: reason for k, reason in why.items()}
        return [o.outputs[0].text.strip() for o in outputs], {}

    def _input(self, request: Request) -> dict[str, Any]:
        if len(request.plans) > MAX_VIDEOS:
            raise InputError(f"generation.engine: vllm is set up for {MAX_VIDEOS} videos, not {len(request.plans)}")
        text = self.bundle.family.chat(self.bundle.tokenizer, request.prompt, len(request.plans), request.turns)
        if not request.plans:
            return {"prompt": text}
        videos = [self.reader.resized(plan).cpu().numpy() for plan in request.plans]
        return {"prompt": text, "multi_modal_data": {"video": videos}}


def _rank(folder: str) -> int:
    """The rank that vLLM sets aside for an adapter of the language model; others it would leave out without a word."""
    from safetensors import safe_open

    with safe_open(str(Path(folder) / FILES[1]), framework="pt") as f:
        names = list(f.keys())
    elsewhere = [name for name in names if ".language_model." not in name]
    if elsewhere:
        raise InputError(
            f"generation.adapter: {folder} changes more than the language model ({elsewhere[0]}), which vllm leaves"
            " out; merge it, or use transformers"
        )
    rank = rank_of(folder)
    if rank > RANKS[-1]:
        raise InputError(f"generation.adapter: {folder} has rank {rank}; vllm takes {RANKS[-1]} at most")
    return min(r for r in RANKS if r >= rank)
