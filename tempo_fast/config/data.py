"""What goes in: the model, the data, and how videos are read and curated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


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
    questions: str = ""
    """JSONL with fields id, video, question, answer, and where they apply options and type: what pairs.method rrpo,
    leanpo and mdpo ask."""
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
    """Shot boundaries: PySceneDetect's content detector (light), or TransNetV2 (extra ``transnet``)."""
    threshold: float = 27.0
    """PySceneDetect's content threshold (its default 27); for transnetv2 the many-hot probability (authors: .5)."""
    min_shot_frames: int = 8
    """Shots with fewer frames are dropped."""
    min_shot_s: float = 0.2
    """Shorter shots are dropped, in seconds."""
    min_contrast: float = 10.0
    """Shots whose grey levels vary less (max - min over all their frames) are dropped."""
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
    timeout_s: float = 300.0
    """Seconds that one video may take; then it is quarantined, and tried again when there is more time."""


@dataclass
class RayConfig:
    """Pools of workers on a Ray cluster (extra ``ray``), in place of processes of this machine."""

    curate_workers: int = 0
    """Workers that curate; 0: no Ray for it."""
    curate_cpus: float = 1.0
    """CPU cores that each of them reserves."""
    curate_gpus: float = 0.0
    """GPUs that each of them reserves; a fraction shares one (TransNetV2 and SigLIP run on it)."""
    pairs_workers: int = 0
    """Workers that answer, each with a model of its own; 0: no Ray for it."""
    pairs_cpus: float = 4.0
    """CPU cores that each of them reserves."""
    pairs_gpus: float = 1.0
    """GPUs that each of them reserves."""
    address: str = ""
    """Of the cluster, as ``ray.init`` takes it; empty joins the one that RAY_ADDRESS names, or starts one here."""
