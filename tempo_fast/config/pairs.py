"""Who answers, and how answers become preference pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tempo_fast.config.check import require
from tempo_fast.perturb import EDITS, KINDS


@dataclass
class GenerationConfig:
    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    """Who answers: this model through transformers, vLLM (extra), or an OpenAI-compatible endpoint."""
    endpoint: str = ""
    """Base URL for ``engine: openai``, such as http://127.0.0.1:8000/v1."""
    model: str = ""
    """The served model to ask, a LoRA by its served name; empty takes the first that the endpoint lists."""
    adapter: str = ""
    """PEFT adapter folder that the transformers and vLLM engines answer with; empty: the model as it is."""
    batch_size: int = 32
    """Answers in progress at a time, in every engine."""
    temperature: float = 0.0
    """0 is greedy. The authors aggregate at 0.7."""
    top_p: float = 1.0
    """Sampled answers draw from the likeliest tokens that together reach this probability."""
    repetition_penalty: float = 1.0
    """The authors use 1.05."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    attempts: int = 5
    """Tries per request of an endpoint, with growing pauses between them."""
    timeout_s: float = 300.0
    """Seconds an endpoint may take for one answer."""


@dataclass
class JudgeConfig:
    endpoint: str = ""
    """Base URL of an OpenAI-compatible endpoint whose model judges open answers and marks key phrases (RRPO); empty:
    rules alone."""
    model: str = ""
    """The served model to ask; empty takes the first that the endpoint lists."""
    batch_size: int = 16
    """Requests in flight."""
    max_new_tokens: int = 512
    """Longest reply in tokens."""


@dataclass
class RRPOPairsConfig:
    chosen: Literal["reference", "model"] = "reference"
    """``reference``: the answer of data.questions; ``model``: the model's own about the clean video where it is
    right."""
    rejected: Literal["model", "rewritten"] = "model"
    """Of open questions: ``model``, its own wrong answer; ``rewritten``: the judge writes the chosen answer again with
    what the wrong answer says otherwise, as the authors do (docs/DATA.md), so that the two differ in little else."""


@dataclass
class LeanPOPairsConfig:
    hints: bool = True
    """The chosen answer is told the reference answer as a hint."""
    reflection: bool = True
    """A second answer improves the first, which it is shown, by the reference; false keeps the first."""
    frames: list[int] = field(default_factory=lambda: [1, 2])
    """Frames the rejected answer sees, drawn per video from these numbers."""
    augment: bool = True
    """Crop, jitter, grey, blur and flip these frames, the same way for all frames of a video."""
    temperature: float = 1.0
    """Of chosen and rejected answers."""
    top_p: float = 0.9
    """Of chosen answers."""
    rejected_top_p: float = 1.0
    """Of rejected answers."""
    metric: str = "rouge_l"
    """Score of both answers against the reference, kept on the record; as pairs.mdpo.metric."""


@dataclass
class MDPOPairsConfig:
    samples: int = 3
    """Answers drawn per question."""
    metric: str = "rouge_l"
    """Score of an answer against the reference, 0 to 100: correct (by the rules for choices, yes and no, and short
    answers), tiou (of time ranges), rouge_l, cider_d, meteor and soda_c (of sentences with time ranges), which need the
    extra ``metrics``, or module:function, which is called with the answer and its QARecord."""
    min_gap: float = 10.0
    """A pair is kept where its answers are at least so many points apart."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """``best_worst``: one pair per question; ``all``: every two samples so far apart (VidChain), a record for each
    chosen one."""
    temperature: float = 0.8
    """Of the samples (VidChain's)."""


@dataclass
class SelectConfig:
    samples: int = 0
    """Answers drawn per question before anything is made of it; 0 keeps all questions."""
    metric: str = "correct"
    """Reward of a sample, as pairs.mdpo.metric."""
    min_std: float = 0.0
    """Questions whose reward has a standard deviation above this over the samples, in points of 100, are kept
    (Temporal-RLT keeps those that vary at all)."""
    temperature: float = 1.0
    """Of the samples."""


@dataclass
class PairsConfig:
    method: Literal["temple", "rrpo", "leanpo", "mdpo"] = "temple"
    """``temple``: captions of curated videos, clean and perturbed. The others ask data.questions: ``rrpo`` pairs right
    answers with wrong ones about perturbed videos, ``leanpo`` reflected answers with answers about sparse, augmented
    videos, ``mdpo`` the best with the worst of several samples (VidChain)."""
    perturb_on: Literal["captions", "frames"] = "captions"
    """``captions``: aggregate perturbed clip captions (official). ``frames``: show the model the perturbed clips."""
    frames_answer: Literal["windows", "video"] = "windows"
    """With ``frames``: re-caption the two-clip windows in perturbed order; or, ``video``, caption the clean and the
    perturbed video once each, under the same instruction (clip_input and aggregate do nothing then)."""
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    """Perturbations, of drop, shuffle, reverse: one rejected answer each. Where whole perturbed videos are shown
    (``method: rrpo``, or ``perturb_on: frames`` with ``frames_answer: video``) also mask, local_shuffle,
    mask_local_shuffle (RRPO), speed, freeze, repeat; tempo_fast.perturb has their rules."""
    r: list[int] = field(default_factory=lambda: [16, 8, 4, 2])
    """Difficulty factors; one file each. leanpo and mdpo take one, as a name."""
    clip_input: Literal["keyframes", "frames"] = "keyframes"
    """What a caption sees of a clip: its two keyframes (official) or its sampled frames."""
    aggregate: Literal["model", "template"] = "model"
    """Clip captions to a description: asked of the model, or joined in order."""
    instruction: Literal["per_video", "per_pair"] = "per_video"
    """One prompt per video, so that its pairs share a tree, or one per pair (official)."""
    max_length_ratio: float = 1.5
    """Shuffle and reverse pairs beyond this character-length ratio are dropped."""
    max_videos: int = 0
    """Use at most this many videos; 0 is all."""
    bucket_videos: int = 64
    """Videos that are worked on together, about; ranks share the buckets. Answers are batched inside a bucket, so that
    they do not depend on the number of ranks."""
    audit_pairs: int = 24
    """Pairs per r on the page for a reader's eyes, pairs/audit.html."""
    rrpo: RRPOPairsConfig = field(default_factory=RRPOPairsConfig)
    """Of ``method: rrpo``."""
    leanpo: LeanPOPairsConfig = field(default_factory=LeanPOPairsConfig)
    """Of ``method: leanpo``."""
    mdpo: MDPOPairsConfig = field(default_factory=MDPOPairsConfig)
    """Of ``method: mdpo``."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Which of data.questions are worth asking."""


def check_generation(g: GenerationConfig, judge: JudgeConfig) -> None:
    """Raises InputError naming the key."""
    require(g.temperature >= 0, "generation.temperature", "0 or more", g.temperature)
    require(0 < g.top_p <= 1, "generation.top_p", "in (0, 1]", g.top_p)
    require(g.timeout_s > 0, "generation.timeout_s", "above 0", g.timeout_s)
    for key, value in (
        ("generation.batch_size", g.batch_size), ("generation.max_new_tokens", g.max_new_tokens),
        ("generation.attempts", g.attempts), ("judge.batch_size", judge.batch_size),
        ("judge.max_new_tokens", judge.max_new_tokens),
    ):  # fmt: skip
        require(value >= 1, key, "1 or more", value)
    endpoint = g.engine == "openai"
    require(not endpoint or bool(g.endpoint), "generation.endpoint", "set for engine openai", g.endpoint)
    require(not (endpoint and g.adapter), "generation.adapter", "empty for engine openai (see model)", g.adapter)


def check_pairs(p: PairsConfig) -> None:
    """Raises InputError naming the key."""
    whole = p.method == "rrpo" or (p.perturb_on == "frames" and p.frames_answer == "video")
    kinds = [*KINDS, *(kind for kind in EDITS if kind != "splice" and whole)]  # a splice is of two videos
    for kind in p.kinds:
        need = ", with perturb_on: frames and frames_answer: video" if kind in EDITS else ""
        require(kind in kinds, "pairs.kinds", f"of {', '.join(kinds)}{need}", kind)
    require(bool(p.kinds) and len(set(p.kinds)) == len(p.kinds), "pairs.kinds", "a non-empty set", p.kinds)
    for r in p.r:
        require(r >= 2, "pairs.r", ">= 2", r)
    require(p.method in ("temple", "rrpo") or len(p.r) == 1, "pairs.r", f"one number for method {p.method}", p.r)
    require(p.max_videos >= 0, "pairs.max_videos", "0 or more", p.max_videos)
    require(p.bucket_videos >= 1, "pairs.bucket_videos", "1 or more", p.bucket_videos)
    require(p.audit_pairs >= 0, "pairs.audit_pairs", "0 or more", p.audit_pairs)
    lean, most, select = p.leanpo, p.mdpo, p.select
    frames = bool(lean.frames) and min(lean.frames) >= 1
    require(frames, "pairs.leanpo.frames", "a list of numbers from 1", lean.frames)
    require(0 < lean.top_p <= 1, "pairs.leanpo.top_p", "in (0, 1]", lean.top_p)
    require(0 < lean.rejected_top_p <= 1, "pairs.leanpo.rejected_top_p", "in (0, 1]", lean.rejected_top_p)
    require(most.samples >= 2, "pairs.mdpo.samples", "2 or more", most.samples)
    require(0 <= most.min_gap <= 100, "pairs.mdpo.min_gap", "in 0..100", most.min_gap)
    require(select.samples == 0 or select.samples >= 2, "pairs.select.samples", "0, or 2 or more", select.samples)
    asks = not select.samples or p.method != "temple"
    require(asks, "pairs.select.samples", "0 for method temple, which asks no questions", select.samples)
    require(select.min_std >= 0, "pairs.select.min_std", "0 or more", select.min_std)
    for key, value in (
        ("pairs.leanpo.temperature", lean.temperature), ("pairs.mdpo.temperature", most.temperature),
        ("pairs.select.temperature", select.temperature),
    ):  # fmt: skip
        require(value > 0, key, "above 0: these answers are samples", value)
