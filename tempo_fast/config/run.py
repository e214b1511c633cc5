"""The configuration of a run, and the rules that its values must keep."""

from __future__ import annotations

from dataclasses import dataclass, field

from tempo_fast.config.check import require
from tempo_fast.config.curriculum import check_curriculum
from tempo_fast.config.data import (
    CurateConfig,
    DataConfig,
    FeaturesConfig,
    LoaderConfig,
    ModelConfig,
    RayConfig,
    VideoConfig,
)
from tempo_fast.config.pairs import GenerationConfig, JudgeConfig, PairsConfig, check_generation, check_pairs
from tempo_fast.config.training import EvalConfig, ReferenceConfig, ReportConfig, TrainConfig, check_engine


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
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def validate(self) -> None:
        """Check everything that can be known without opening a file. Raises InputError naming the key."""
        v, p, t = self.video, self.pairs, self.train
        require(v.fps > 0, "video.fps", "above 0", v.fps)
        require(1 <= v.min_frames <= v.max_frames, "video.min_frames", "in 1..video.max_frames", v.min_frames)
        require(0 < v.min_pixels <= v.max_pixels, "video.min_pixels", "in 1..video.max_pixels", v.min_pixels)
        require(
            0 < self.curate.group_similarity <= 1, "curate.group_similarity", "in (0, 1]", self.curate.group_similarity
        )
        require(
            self.curate.min_shots <= self.curate.max_shots, "curate.min_shots", "<= max_shots", self.curate.min_shots
        )
        require(
            self.curate.detector != "transnetv2" or 0 < self.curate.threshold < 1,
            "curate.threshold",
            "in (0, 1) with detector transnetv2, as a probability (its authors' is 0.5)",
            self.curate.threshold,
        )
        check_pairs(p)
        # the other methods name their own kinds
        check_curriculum(t.stages, t.adaptive, t.sft, p.r, p.kinds if p.method == "temple" else None)
        for key, value in (
            ("train.learning_rate", t.learning_rate), ("train.weight_decay", t.weight_decay),
            ("train.sft.learning_rate", t.sft.learning_rate), ("train.max_grad_norm", t.max_grad_norm),
            
            ("train.sft.epochs", t.sft.epochs), ("train.sft.max_steps", t.sft.max_steps),
            ("eval.max_videos", self.eval.max_videos), ("report.pairs", self.report.pairs),
            ("model.threads", self.model.threads), ("curate.workers", self.curate.workers),
            ("features.memory_gib", self.features.memory_gib), ("loader.workers", self.loader.workers),
            *((f"ray.{name}", value) for name, value in vars(self.ray).items() if name != "address"),
        ):  # fmt: skip
            require(value >= 0, key, "0 or more", value)
        for key, value in (
            ("train.max_tokens", t.max_tokens), ("train.keep_checkpoints", t.keep_checkpoints),
            ("train.sft.batch_size", t.sft.batch_size),
            ("eval.bootstrap", self.eval.bootstrap),
            ("report.strip_frames", self.report.strip_frames), ("curate.max_group_runs", self.curate.max_group_runs),
            ("loader.ahead", self.loader.ahead), ("train.length_window", t.length_window),
        ):  # fmt: skip
            require(value >= 1, key, "1 or more", value)
        require(0 <= t.lora.dropout < 1, "train.lora.dropout", "in [0, 1)", t.lora.dropout)
        require(0 <= t.adam_beta2 < 1, "train.adam_beta2", "in [0, 1)", t.adam_beta2)
        for r in self.eval.r:
            require(r >= 2, "eval.r", ">= 2", r)
        device = self.model.device
        require(device in ("auto", "cpu") or device.startswith("cuda"), "model.device", "auto, cpu or cuda", device)
        require(t.batch_size >= 1, "train.batch_size", ">= 1", t.batch_size)
        require(0 <= t.warmup_ratio < 1, "train.warmup_ratio", "in [0, 1)", t.warmup_ratio)
        require(t.save_steps >= 1, "train.save_steps", ">= 1", t.save_steps)
        require(t.lora.r >= 1, "train.lora.r", ">= 1", t.lora.r)
        check_engine(t, self.model.dtype)
        check_generation(self.generation, self.judge)
        require(
            self.curate.embedder != "siglip" or bool(self.curate.embedder_path),
            "curate.embedder_path",
            "set for embedder siglip",
            self.curate.embedder_path,
        )
        require(self.loader.timeout_s > 0, "loader.timeout_s", "above 0", self.loader.timeout_s)
        require(self.curate.timeout_s > 0, "curate.timeout_s", "above 0", self.curate.timeout_s)
        require(
            not (self.features.batched and self.features.disk),
            "features.batched",
            "false with features.disk, which keeps features of one video alone",
            self.features.batched,
        )
        require(self.features.disk_gib > 0, "features.disk_gib", "above 0", self.features.disk_gib)
        require(bool(self.output_dir), "output_dir", "a folder", self.output_dir)
