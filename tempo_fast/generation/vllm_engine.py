"""vLLM's offline engine: continuous batching on a GPU. An extra; needs the package ``vllm``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tempo_fast.config import GenerationConfig
from tempo_fast.errors import InputError
from tempo_fast.files import digest
from tempo_fast.generation.base import Request, request_identity, sampling_provenance
from tempo_fast.models.load import Bundle

# most videos of one prompt: the two clips of a caption window
MAX_VIDEOS = 2


class VLLMEngine:
    """Answers with a vLLM engine of its own, loaded from the bundle's directory (no adapters).

    Frames are handed over decoded and resized, so that vLLM's processor keeps sampling and size as planned; positions
    are vLLM's own, which follow the pretraining rule.

    Raises:
        InputError: vLLM is not installed, the bundle's model carries adapters, or its family sees whole frames or is
            told when they are shown.
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
        if hasattr(bundle.model, "peft_config"):
            raise InputError("generation.engine: vllm answers with merged weights only; merge the adapters first")
        self.config, self.bundle, self.reader, self.seed = config, bundle, reader, seed
        self.llm = LLM(
            model=bundle.path,
            dtype=str(bundle.dtype).removeprefix("torch."),
            seed=seed,
            max_num_seqs=config.batch_size,
            limit_mm_per_prompt={"video": MAX_VIDEOS, "image": 0},
            mm_processor_kwargs={"do_resize": False, "do_sample_frames": False},
            enable_prefix_caching=True,
        )

    def provenance(self) -> dict[str, Any]:
        """Engine and its version, checkpoint, dtype and sampling parameters."""
        import vllm

        return {
            "engine": "vllm",
            "version": vllm.__version__,
            "model": self.bundle.digest,
            "dtype": str(self.bundle.dtype).removeprefix("torch."),
            **sampling_provenance(self.config, self.seed),
        }

    def generate(self, requests: Sequence[Request], desc: str = "") -> list[str]:
        """See base.Engine; the progress bar is vLLM's."""
        from vllm import SamplingParams

        inputs, parameters = [], []
        for r in requests:
            inputs.append(self._input(r))
            parameters.append(
                SamplingParams(
                    temperature=self.config.temperature,
                    repetition_penalty=self.config.repetition_penalty,
                    max_tokens=r.max_new_tokens or self.config.max_new_tokens,
                    seed=int(digest([self.seed, request_identity(r)])[:8], 16),
                )
            )
        outputs = self.llm.generate(inputs, parameters, use_tqdm=bool(desc))
        return [o.outputs[0].text.strip() for o in outputs]

    def _input(self, request: Request) -> dict[str, Any]:
        content: list[dict[str, str]] = [{"type": "video"} for _ in request.plans]
        content.append({"type": "text", "text": request.prompt})
        text = self.bundle.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if not request.plans:
            return {"prompt": text}
        videos = [self.reader.resized(plan).cpu().numpy() for plan in request.plans]
        return {"prompt": text, "multi_modal_data": {"video": videos}}
