"""What the vLLM engine asks of vLLM: a stand-in that knows the names, and vLLM itself where it is installed.

Names, defaults and rules of the stand-in were read in vllm-project/vllm 0.32.0: vllm/entrypoints/llm.py (LLM),
vllm/engine/arg_utils.py (EngineArgs), vllm/sampling_params.py, vllm/lora/request.py, vllm/config/lora.py,
vllm/inputs. The tests at the end were run with the CPU build of that version.
"""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import pytest
import tiny_qwen
import torch
from counter_clips import write_counter

from tempo_fast.config import GenerationConfig, VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.generation import RefusedRequest, Request, make_engine
from tempo_fast.models.family import CLIP_MEAN, CLIP_STD
from tempo_fast.models.load import load_bundle
from tempo_fast.trees.vision import FeatureCache
from tempo_fast.video.reader import VideoReader

MaxLoRARanks = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        assert 0 < self.top_p <= 1 and self.temperature >= 0 and self.repetition_penalty > 0
        assert self.max_tokens is not None and self.max_tokens >= 1
        assert self.seed is None or 0 <= self.seed < 2**63


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self) -> None:
        assert self.lora_int_id >= 1 and self.lora_path


@dataclass
class LLM:
    model: str
    dtype: str = "auto"
    seed: int = 0
    max_num_seqs: int | None = None
    limit_mm_per_prompt: dict[str, int] = field(default_factory=dict)
    mm_processor_kwargs: dict[str, Any] | None = None
    enable_prefix_caching: bool | None = None
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16

    def __post_init__(self) -> None:
        assert self.dtype in ("auto", "float32", "float16", "bfloat16")
        assert self.max_lora_rank in get_args(MaxLoRARanks)
        assert set(self.limit_mm_per_prompt) <= {"image", "video", "audio"}
        self.asked: list[Any] = []
        made.append(self)

    def generate(
        self, prompts: Any, sampling_params: Any = None, *, use_tqdm: Any = True, lora_request: Any = None,
        priority: Any = None, tokenization_kwargs: Any = None, mm_processor_kwargs: Any = None,
    ) -> list[Any]:  # fmt: skip
        assert len(prompts) == len(sampling_params)
        assert lora_request is None or self.enable_lora
        out = []
        for prompt, parameters in zip(prompts, sampling_params, strict=True):
            assert isinstance(parameters, SamplingParams) and set(prompt) <= {"prompt", "multi_modal_data"}
            videos = prompt.get("multi_modal_data", {}).get("video", [])
            assert len(videos) <= self.limit_mm_per_prompt["video"]
            for video in videos:  # uint8 [F, H, W, 3]: an array of three axes would be taken for one video of images
                assert isinstance(video, np.ndarray) and video.dtype == np.uint8 and video.ndim == 4
                assert video.shape[-1] == 3
            assert prompt["prompt"].count("<|video_pad|>") == len(videos)
            self.asked.append((prompt, parameters, lora_request))
            text = f" {len(self.asked)} "
            out.append(types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text)]))
        return out


made: list[LLM] = []


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in, imported as vLLM."""
    module: Any = types.ModuleType("vllm")
    module.LLM, module.SamplingParams, module.__version__ = LLM, SamplingParams, "0.32.0"
    request: Any = types.ModuleType("vllm.lora.request")
    request.LoRARequest = LoRARequest
    for name, part in (("vllm", module), ("vllm.lora", types.ModuleType("vllm.lora")), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, part)
    made.clear()
    return module


@pytest.fixture(scope="module")
def reader(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("v") / "counter.mp4"
    write_counter(path, 45, size=(84, 112))
    config = VideoConfig(backend="pyav", fps=5, min_frames=2, min_pixels=784, max_pixels=56 * 84)
    reader = VideoReader(config, tiny.geometry)
    reader.path = str(path)
    return reader


def requests_of(reader: Any) -> list[Request]:
    """A whole video, clips, an odd number of frames, two clips, words alone, turns."""
    path = reader.path
    plans = [
        reader.plan(path),
        reader.plan(path, [3, 9]),
        reader.plan_range(path, 20, 31),
        reader.plan(path, [1, 2, 3]),
    ]
    return [
        *(Request((p,), "Describe what happens in this video in order.") for p in plans),
        Request((plans[1], plans[2]), "Say it.", 9),
        Request((), "What happened before the blue square?"),
        Request((plans[3],), "Then?", turns=[("Say it.", "A red circle moves left.")]),
    ]


def test_what_is_asked(vllm: Any, tiny_path: str, reader: Any) -> None:
    bundle = load_bundle(tiny_path, "float32", "cpu", weights=False)
    config = GenerationConfig(engine="vllm", batch_size=5, max_new_tokens=21, top_p=0.8, repetition_penalty=1.05)
    engine = make_engine(config, bundle, reader, None, 3)
    (llm,) = made
    assert (llm.model, llm.dtype, llm.seed, llm.max_num_seqs) == (tiny_path, "float32", 3, 5)
    requests = requests_of(reader)
    drawn = [Request((), "So?", temperature=0.7, sample=i) for i in range(3)] + [Request((), "So?", temperature=0.7)]
    texts = engine.generate(requests + drawn)
    assert texts == [str(i + 1) for i in range(len(requests) + len(drawn))]
    for r, (prompt, parameters, lora) in zip(requests, llm.asked, strict=False):
        assert prompt["prompt"] == bundle.family.chat(bundle.tokenizer, r.prompt, len(r.plans), r.turns)
        shown = prompt.get("multi_modal_data", {}).get("video", [])
        assert [v.shape[:3] for v in shown] == [(len(p.indices), p.height, p.width) for p in r.plans]
        assert all((torch.from_numpy(v) == reader.resized(p)).all() for v, p in zip(shown, r.plans, strict=True))
        assert (parameters.temperature, parameters.top_p, parameters.repetition_penalty) == (0, 1.0, 1.05)
        assert parameters.max_tokens == (r.max_new_tokens or 21) and lora is None
        assert parameters.stop_token_ids == [bundle.tokenizer.eos_token_id]
    seeds = [p.seed for _, p, _ in llm.asked[len(requests) :]]
    assert len(set(seeds)) == 3 and seeds[0] == seeds[3]
    assert all((p.temperature, p.top_p) == (0.7, 0.8) for _, p, _ in llm.asked[len(requests) :])
    assert engine.provenance() == {
        "engine": "vllm", "version": "0.32.0", "model": bundle.digest, "dtype": "float32", "temperature": 0.0,
        "repetition_penalty": 1.05, "max_new_tokens": 21,
    }  # fmt: skip
    with pytest.raises(InputError, match="set up for 2 videos, not 3"):
        engine.generate([Request([reader.plan(reader.path, [1])] * 3, "Say it.")])


@pytest.mark.parametrize("long", [[0], [3], [1, 4], [0, 1, 2, 3, 4]])
def test_a_prompt_longer_than_the_model_takes(
    vllm: Any, tiny_path: str, reader: Any, monkeypatch: pytest.MonkeyPatch, long: list[int]
) -> None:
    """vLLM refuses all that are handed over with it (vllm/v1/engine/input_processor.py, _validate_prompt_len)."""
    bundle = load_bundle(tiny_path, "float32", "cpu", weights=False)
    engine = make_engine(GenerationConfig(engine="vllm"), bundle, reader, None, 3)

    def generate(prompts: Any, parameters: Any, **options: Any) -> list[Any]:
        for prompt in prompts:
            if "long" in prompt["prompt"]:
                raise ValueError("The decoder prompt (length 99) is longer than the maximum model length of 64. Make")
            if "bug" in prompt["prompt"]:
                raise ValueError("something else")
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text=p["prompt"])]) for p in prompts]

    monkeypatch.setattr(engine.llm, "generate", generate)
    requests = [Request((), f"{'long' if i in long else 'short'} {i}") for i in range(5)]
    with pytest.raises(RefusedRequest, match=r"^generation\.engine: vllm refuses .*longer than the maximum") as e:
        engine.generate(requests)
    assert sorted(e.value.reasons) == long
    for i, text in enumerate(e.value.texts):
        assert (text == "") if i in long else f"short {i}" in text
    with pytest.raises(ValueError, match="something else"):
        engine.generate([Request((), "bug")])


@pytest.mark.parametrize("rank, reserved", [(1, 1), (3, 8), (33, 64)])
def test_an_adapter(vllm: Any, tiny: Any, lora: Any, reader: Any, tmp_path: Any, rank: int, reserved: int) -> None:
    lora(tiny, r=rank).model.save_pretrained(tmp_path)
    config = GenerationConfig(engine="vllm", adapter=str(tmp_path))
    engine = make_engine(config, tiny, reader, None, 0)
    engine.generate([Request((), "So?")])
    assert (made[0].enable_lora, made[0].max_lora_rank) == (True, reserved)
    assert made[0].asked[0][2] == LoRARequest("generation", 1, str(tmp_path))
    same = make_engine(replace(config, engine="transformers"), tiny, reader, FeatureCache(), 0)
    assert engine.provenance()["adapter"] == same.provenance()["adapter"]


def test_adapters_that_vllm_does_not_take(
    vllm: Any, tiny: Any, tiny_lora: Any, lora: Any, reader: Any, tmp_path: Any
) -> None:
    lora(tiny, vision=True).model.save_pretrained(tmp_path / "vision")
    with pytest.raises(InputError, match="changes more than the language model"):
        make_engine(GenerationConfig(engine="vllm", adapter=str(tmp_path / "vision")), tiny, reader, None, 0)
    lora(tiny).model.save_pretrained(tmp_path / "large")
    settings = json.loads((tmp_path / "large" / "adapter_config.json").read_text())
    (tmp_path / "large" / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": {"q_proj": 600}}))
    with pytest.raises(InputError, match="rank 600; vllm takes 512 at most"):
        make_engine(GenerationConfig(engine="vllm", adapter=str(tmp_path / "large")), tiny, reader, None, 0)
    with pytest.raises(InputError, match="reads its weights from files"):
        make_engine(GenerationConfig(engine="vllm"), tiny_lora, reader, None, 0)
    assert made == []


def test_refused_where_it_would_tell_the_time_itself(successor: Any, reader: Any) -> None:
    with pytest.raises(InputError, match=f"vllm writes the prompts of {successor.family.name} itself"):
        make_engine(GenerationConfig(engine="vllm"), successor, reader, None, 0)


def test_missing_says_what_to_install(tiny: Any, reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"pip install 'tempo-fast\[vllm\]'"):
        make_engine(GenerationConfig(engine="vllm"), tiny, reader, None, 0)


# -- vLLM itself ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen2-VL whose heads have 32 channels, the fewest that vLLM's CPU kernels take, with its processors."""
    import transformers

    tokenizer = tiny_qwen.make_tokenizer()
    config = tiny_qwen.make_config(tokenizer)
    config.text_config.hidden_size = config.vision_config.hidden_size = 128
    config.text_config.rope_parameters = {**config.text_config.rope_parameters, "mrope_section": [4, 6, 6]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Qwen2VLForConditionalGeneration(config)
    path = tmp_path_factory.mktemp("wide")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    pixels = {
        "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 784, "max_pixels": 602112,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "processor_class": "Qwen2VLProcessor",
    }  # fmt: skip
    for name, kind in (("", {"image_processor_type": "Qwen2VLImageProcessor"}),
                       ("video_", {"video_processor_type": "Qwen2VLVideoProcessor"})):  # fmt: skip
        (path / f"{name}preprocessor_config.json").write_text(json.dumps({**pixels, **kind}))
    return str(path)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("with_adapter", [False, True])
def test_greedy_answers_are_those_of_the_transformers_engine(
    wide: str, lora: Any, reader: Any, tmp_path: Any, with_adapter: bool
) -> None:
    pytest.importorskip("vllm")
    bundle = load_bundle(wide, "float32", "cpu")
    if with_adapter:
        lora(bundle).model.save_pretrained(tmp_path)
    config = GenerationConfig(max_new_tokens=24, batch_size=8, adapter=str(tmp_path) if with_adapter else "")
    requests = requests_of(reader)
    want = make_engine(config, bundle, reader, FeatureCache(), 3).generate(requests)
    engine = make_engine(replace(config, engine="vllm"), bundle, reader, None, 3)
    got = engine.generate(requests)
    # vLLM holds back the bytes of a character that is not complete
    assert [t.rstrip("\ufffd") for t in got] == [t.rstrip("\ufffd") for t in want] and len(set(want)) == len(want)
    drawn = [Request((), "So?", temperature=1.0, sample=i) for i in range(4)]
    texts = engine.generate(drawn)
    assert engine.generate(drawn[::-1]) == texts[::-1] and len(set(texts)) > 2
