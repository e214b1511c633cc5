"""The configuration of a run: nested dataclasses, one docstring per field, validated before any work.

A recipe is the YAML form of ``RunConfig``; every key can be overridden on the command line with its dotted name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tempo_fast.errors import InputError
from tempo_fast.perturb import EDITS, KINDS


def _require(ok: bool, key: str, rule: str, value: Any) -> None:
    if not ok:
        raise InputError(f"config: {key} must be {rule}, got {value!r}")


@dataclass
class ModelConfig:
    path: str = "tinyworld"
    """Local directory of a transformers checkpoint; ``tinyworld`` is the small model shipped with the package."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Weights and activations. LoRA weights and the loss are always float32."""
    device: str = "auto"
    """``auto`` (CUDA when there is one), ``cpu``, ``cuda``."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's own choice."""


@dataclass
class TinyworldConfig:
    train: int = 48
    """Generated training videos."""
    heldout: int = 24
    """Generated held-out videos for the probes."""
    seed: int = 0
    """Of the world; the base model was trained on other seeds."""


@dataclass
class DataConfig:
    videos: str = ""
    """Folder or glob of the training videos, or a text file with one path a line; ``tinyworld`` generates them, with
    the SFT, truth and question files below, under <output_dir>/world."""
    tinyworld: TinyworldConfig = field(default_factory=TinyworldConfig)
    """Size of the generated world for ``videos: tinyworld``."""
    prompts: str = ""
    """Optional JSONL with fields video and prompt; empty draws from the built-in captioning instructions."""
    sft: str = ""
    """JSONL with fields id, video, prompt, response; empty skips the SFT stage."""
    eval_truth: str = ""
    """JSONL with fields video and events or description (held-out videos); empty skips captions and pairwise probes."""
    eval_questions: str = ""
    """JSONL with fields id, video, question, options, answer, type; empty skips multiple choice."""


@dataclass
class VideoConfig:
    backend: Literal["auto", "pyav", "torchcodec", "dali-cpu", "dali-gpu"] = "auto"
    """Decoder. ``auto`` takes dali-gpu with a CUDA device and DALI installed, else pyav. A missing one is an error."""
    sampling: Literal["auto", "qwen_vl_utils", "hf_qwen2_vl", "hf_qwen3_vl", "hf_uniform", "hf_internvl"] = "auto"
    """Rule that turns (frames, fps) into indices; ``auto`` is the model family's own.
    ``qwen_vl_utils``: linspace + round; ``hf_qwen2_vl``, ``hf_uniform``: the first frame of even parts, as transformers
    computes it; ``hf_internvl``: the middle frame of each. A fixed number of frames: min_frames = max_frames."""
    fps: float = 1.0
    """Sampled frames per second."""
    min_frames: int = 4
    """Fewest sampled frames of a video."""
    max_frames: int = 600
    """Most sampled frames of a video."""
    min_pixels: int = 3136
    """Fewest pixels of a resized frame. Families whose frames have one size ignore the three pixel settings."""
    max_pixels: int = 602112
    """Most pixels of a resized frame (768 * 28 * 28)."""
    total_pixels: int = 9_000_000
    """Budget of a video as qwen-vl-utils counts it: a frame may have total / frames * temporal patch (2) pixels."""


@dataclass
class LoaderConfig:
    """How videos are read while the model works. Changes no result, but where a video takes longer than its time."""

    workers: int = 2
    """Threads per process that decode ahead of the step; 0 decodes when a video is needed."""
    ahead: int = 4
    """Most videos decoded and not used yet. One holds 4.7 kB per patch of 14 pixels in float32: about 0.2 GB at 11,500
    visual tokens of Qwen2-VL, half of it in bfloat16."""
    timeout_s: float = 300.0
    """Longest time for one video, in seconds; then it counts as broken."""


@dataclass
class FeaturesConfig:
    memory_gib: float = 1.0
    """Visual features of frozen towers kept in memory, GiB per process; the least recently used go first."""
    disk: str = ""
    """Folder that keeps them for later stages, epochs and runs, which then neither decode nor encode; empty keeps none.
    Several processes and runs may share it."""
    disk_gib: float = 100.0
    """Size of that folder, GiB; the least recently used go first."""
    disk_dtype: Literal["same", "bfloat16"] = "same"
    """``same``: as the tower gives them, so that nothing changes. ``bfloat16``: half the space of a float32 model's
    features, rounded; everything then uses rounded ones, cached or not."""
    batched: bool = False
    """Encode the videos of a micro-batch that are not cached in one call of the tower, which is faster for many short
    ones. Rounding then depends on what stood beside a video: a resumed run is not bit-equal, and ``disk`` is refused.
    false: a call for each."""


@dataclass
class CurateConfig:
    detector: Literal["pyscenedetect", "transnetv2"] = "pyscenedetect"
    """Shot boundaries: PySceneDetect's content detector (light), or TransNetV2 (extra ``curate``)."""
    threshold: float = 27.0
    """PySceneDetect's content threshold (its default 27); for transnetv2 the many-hot probability (authors: .5)."""
    min_shot_frames: int = 8
    """Shots with fewer frames are dropped."""
    min_shot_s: float = 0.2
    """Shorter shots are dropped, in seconds."""
    min_contrast: float = 10.0
    """Shots whose grey level varies less (max - min of their middle frame) are dropped."""
    min_shots: int = 4
    """Fewest shots of a usable video."""
    max_shots: int = 32
    """Most shots of a usable video."""
    max_shot_s: float = 16.0
    """Longest shot of a usable video, in seconds."""
    embedder: Literal["histogram", "siglip"] = "histogram"
    """Image embedding of a shot's middle frame: colour histogram, or SigLIP through transformers."""
    embedder_path: str = ""
    """Local SigLIP checkpoint for ``embedder: siglip``."""
    group_similarity: float = 0.8
    """Shots merge while their (averaged) cosine similarity is above this. The value belongs to one embedder."""
    min_clips: int = 4
    """Fewest clips of a usable video."""
    max_group_runs: int = 3
    """A group may come back in at most this many runs, and in at most a third of the clips."""
    workers: int = 0
    """Processes; 0 takes one per core where there are enough videos to be worth it."""


@dataclass
class GenerationConfig:
    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    """Who answers: this model through transformers, vLLM (extra), or an OpenAI-compatible endpoint."""
    endpoint: str = ""
    """Base URL for ``engine: openai``, such as http://127.0.0.1:8000/v1."""
    batch_size: int = 32
    """Prompts answered together by the transformers engine."""
    temperature: float = 0.0
    """0 is greedy. The authors aggregate at 0.7."""
    repetition_penalty: float = 1.0
    """The authors use 1.05."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""


@dataclass
class PairsConfig:
    perturb_on: Literal["captions", "frames"] = "captions"
    """``captions``: aggregate perturbed clip captions (official). ``frames``: show the model the perturbed clips."""
    frames_answer: Literal["windows", "video"] = "windows"
    """With ``frames``: re-caption the two-clip windows in perturbed order; or, ``video``, caption the clean and the
    perturbed video once each, under the same instruction (clip_input and aggregate do nothing then)."""
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    """Perturbations, of drop, shuffle, reverse: one rejected answer each. Where whole perturbed videos are captioned
    (``perturb_on: frames``, ``frames_answer: video``) also mask, local_shuffle, mask_local_shuffle (RRPO), speed,
    freeze, repeat; tempo_fast.perturb has their rules."""
    r: list[int] = field(default_factory=lambda: [16, 8, 4, 2])
    """Difficulty factors; one file each."""
    clip_input: Literal["keyframes", "frames"] = "keyframes"
    """What a caption sees of a clip: its two keyframes (official) or its sampled frames."""
    aggregate: Literal["model", "template"] = "model"
    """Clip captions to a description: asked of the model, or joined in order."""
    instruction: Literal["per_video", "per_pair"] = "per_video"
    """One prompt per video, so that its pairs share a tree, or one per pair (official)."""
    max_length_ratio: float = 1.5
    """Shuffle and reverse pairs beyond this character-length ratio are dropped."""
    max_videos: int = 0
    """Use at most this many curated videos; 0 is all."""


@dataclass
class LoraConfig:
    r: int = 32
    """Rank."""
    alpha: int = 64
    """Scale is alpha / r."""
    dropout: float = 0.05
    """On the adapter's input."""


@dataclass
class ObjectiveConfig:
    name: str = "dpo"
    """One of tempo_kernels.objectives: dpo, cdpo, robust, ipo, hinge, simpo, leanpo, rrpo, ..."""
    options: dict[str, float] = field(default_factory=lambda: {"beta": 0.1, "sft_weight": 1.0})
    """The objective's own options, as its docstring names them."""


@dataclass
class StageConfig:
    r: int = 16
    """Difficulty of the pairs of this stage."""
    epochs: int = 1
    """Passes over them."""
    learning_rate: float = 0.0
    """Peak; 0 takes train.learning_rate."""


@dataclass
class SFTConfig:
    epochs: int = 1
    """Passes over data.sft; 0 skips the stage."""
    learning_rate: float = 1e-4
    """Peak."""
    alpha: int = 32
    """LoRA alpha of the SFT adapter."""
    batch_size: int = 16
    """Records per optimizer step."""
    vision_lora: bool = True
    """Adapters on the vision tower too."""
    max_steps: int = 0
    """Stop after this many steps; 0 is all."""
    control: bool = True
    """Also run SFT alone from the base model, on the same data, as the control of the evaluation."""


@dataclass
class TrainConfig:
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Loss of the preference stages."""
    stages: list[StageConfig] = field(default_factory=lambda: [StageConfig(r=r) for r in (16, 8, 4, 2)])
    """The curriculum, in order."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """The stage after the curriculum."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters of the preference stages (language model only)."""
    learning_rate: float = 5e-6
    """Peak of each stage."""
    batch_size: int = 16
    """Pairs per optimizer step over all ranks: in a tree of one chosen and three rejected the chosen counts thrice."""
    max_tokens: int = 16384
    """Token budget of one packed row; a record that is longer is an error."""
    length_window: int = 1
    """Optimizer steps whose records are sorted by length before they are dealt to steps: more than 1 makes the records
    of a step alike, so that ranks finish together and rows are full; the order of the steps stays random."""
    weight_decay: float = 0.1
    """AdamW."""
    adam_beta2: float = 0.95
    """AdamW; beta1 is 0.9."""
    warmup_ratio: float = 0.05
    """Share of a stage's steps with linear warm-up; then cosine to 0."""
    max_grad_norm: float = 1.0
    """Gradient clipping; 0 is off."""
    gradient_checkpointing: bool | Literal["none", "full", "selective"] = "full"
    """What the backward computes again. ``full`` (true): every layer; ``none`` (false): nothing; ``selective``: all
    but attention and the projections that do not widen, for about five times the memory of ``full`` (attention by
    ``flex`` is compiled, and computed again)."""
    liger_kernels: bool | Literal["auto"] = False
    """RMSNorm, SwiGLU and (but for Qwen-VL) RoPE of the text model by the package liger-kernel, on CUDA; they change
    rounding alone. true: an error where they cannot run; ``auto``: the model's own there."""
    save_steps: int = 50
    """Checkpoint every so many optimizer steps, and at the end of each stage."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept while a stage runs."""
    engine: Literal["torch", "deepspeed"] = "torch"
    """Plain torch on one process, or DeepSpeed under torchrun."""
    zero_stage: Literal[0, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    attention: Literal["auto", "dense", "split", "flash", "flex"] = "auto"
    """Of packed trees. ``flex``: FlexAttention with a block mask, trains on CUDA alone; ``flash``: the flash-attn
    package; ``split``: prompt and branches apart, on torch's own kernels; ``dense``: the model's own attention with a
    mask of all tokens by all tokens, slow. ``auto`` takes the first of these that runs, never ``dense``."""
    trees: bool = True
    """One row per video for all its answers; false runs each answer as a row of its own (slow; same result)."""


@dataclass
class ReferenceConfig:
    mode: Literal["base", "previous_stage"] = "base"
    """``base``: one reference for all stages, one LoRA. ``previous_stage``: merge, refill, new LoRA (official)."""
    store: str = ""
    """Folder of the statistics; empty is <output_dir>/reference. Can be shared by runs."""
    kl: Literal["objective", "always"] = "objective"
    """Store what the exact KL needs only when the objective uses it, or always, so that the KL is logged."""


@dataclass
class EvalConfig:
    r: list[int] = field(default_factory=lambda: [16, 8, 4, 2])
    """Difficulties of the pairwise probe."""
    max_videos: int = 0
    """Use at most this many held-out videos; 0 is all."""
    captions: bool = True
    """Also generate free captions and score objects and order."""
    stages: Literal["all", "ends"] = "all"
    """Evaluate after every stage, or only base, last stage, SFT and control."""
    bootstrap: int = 1000
    """Resamples over videos for the 95 % intervals."""


@dataclass
class ReportConfig:
    pairs: int = 2
    """Film strips per kind and r."""
    strip_frames: int = 24
    """Frames of a film strip."""


@dataclass
class RunConfig:
    output_dir: str = "runs/run"
    """Everything a run writes goes below this folder."""
    seed: int = 0
    """Of every draw: data order, perturbations, adapters, bootstrap."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    curate: CurateConfig = field(default_factory=CurateConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def validate(self) -> None:
        """Check everything that can be known without opening a file. Raises InputError naming the key."""
        v, p, t = self.video, self.pairs, self.train
        _require(v.fps > 0, "video.fps", "above 0", v.fps)
        _require(1 <= v.min_frames <= v.max_frames, "video.min_frames", "in 1..video.max_frames", v.min_frames)
        _require(0 < v.min_pixels <= v.max_pixels, "video.min_pixels", "in 1..video.max_pixels", v.min_pixels)
        _require(
            0 < self.curate.group_similarity <= 1, "curate.group_similarity", "in (0, 1]", self.curate.group_similarity
        )
        _require(
            self.curate.min_shots <= self.curate.max_shots, "curate.min_shots", "<= max_shots", self.curate.min_shots
        )
        whole = p.perturb_on == "frames" and p.frames_answer == "video"
        kinds = [*KINDS, *(kind for kind in EDITS if kind != "splice" and whole)]  # a splice is of two videos
        for kind in p.kinds:
            need = ", with perturb_on: frames and frames_answer: video" if kind in EDITS else ""
            _require(kind in kinds, "pairs.kinds", f"of {', '.join(kinds)}{need}", kind)
        _require(bool(p.kinds) and len(set(p.kinds)) == len(p.kinds), "pairs.kinds", "a non-empty set", p.kinds)
        for r in p.r:
            _require(r >= 2, "pairs.r", ">= 2", r)
        for i, stage in enumerate(t.stages):
            _require(stage.r in p.r, f"train.stages[{i}].r", f"one of pairs.r {p.r}", stage.r)
            _require(stage.epochs >= 1, f"train.stages[{i}].epochs", ">= 1", stage.epochs)
        for key, value in (
            ("train.learning_rate", t.learning_rate), ("train.weight_decay", t.weight_decay),
            ("train.sft.learning_rate", t.sft.learning_rate), ("train.max_grad_norm", t.max_grad_norm),
            ("generation.temperature", self.generation.temperature), ("pairs.max_videos", p.max_videos),
            ("train.sft.epochs", t.sft.epochs), ("train.sft.max_steps", t.sft.max_steps),
            ("eval.max_videos", self.eval.max_videos), ("report.pairs", self.report.pairs),
            ("model.threads", self.model.threads), ("curate.workers", self.curate.workers),
            ("features.memory_gib", self.features.memory_gib), ("loader.workers", self.loader.workers),
        ):  # fmt: skip
            _require(value >= 0, key, "0 or more", value)
        for key, value in (
            ("train.max_tokens", t.max_tokens), ("train.keep_checkpoints", t.keep_checkpoints),
            ("train.sft.batch_size", t.sft.batch_size), ("generation.batch_size", self.generation.batch_size),
            ("generation.max_new_tokens", self.generation.max_new_tokens), ("eval.bootstrap", self.eval.bootstrap),
            ("report.strip_frames", self.report.strip_frames), ("curate.max_group_runs", self.curate.max_group_runs),
            ("loader.ahead", self.loader.ahead), ("train.length_window", t.length_window),
        ):  # fmt: skip
            _require(value >= 1, key, "1 or more", value)
        _require(0 <= t.lora.dropout < 1, "train.lora.dropout", "in [0, 1)", t.lora.dropout)
        _require(0 <= t.adam_beta2 < 1, "train.adam_beta2", "in [0, 1)", t.adam_beta2)
        for r in self.eval.r:
            _require(r >= 2, "eval.r", ">= 2", r)
        device = self.model.device
        _require(device in ("auto", "cpu") or device.startswith("cuda"), "model.device", "auto, cpu or cuda", device)
        _require(t.batch_size >= 1, "train.batch_size", ">= 1", t.batch_size)
        _require(0 <= t.warmup_ratio < 1, "train.warmup_ratio", "in [0, 1)", t.warmup_ratio)
        _require(t.save_steps >= 1, "train.save_steps", ">= 1", t.save_steps)
        _require(t.lora.r >= 1, "train.lora.r", ">= 1", t.lora.r)
        _require(t.engine == "deepspeed" or t.zero_stage == 0, "train.zero_stage", "0 without deepspeed", t.zero_stage)
        _require(
            self.generation.engine != "openai" or bool(self.generation.endpoint),
            "generation.endpoint",
            "set for engine openai",
            self.generation.endpoint,
        )
        _require(
            self.curate.embedder != "siglip" or bool(self.curate.embedder_path),
            "curate.embedder_path",
            "set for embedder siglip",
            self.curate.embedder_path,
        )
        _require(self.loader.timeout_s > 0, "loader.timeout_s", "above 0", self.loader.timeout_s)
        _require(
            not (self.features.batched and self.features.disk),
            "features.batched",
            "false with features.disk, which keeps features of one video alone",
            self.features.batched,
        )
        _require(self.features.disk_gib > 0, "features.disk_gib", "above 0", self.features.disk_gib)
        _require(bool(self.output_dir), "output_dir", "a folder", self.output_dir)
