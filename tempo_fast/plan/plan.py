"""A plan: what a recipe takes on so many devices, as numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempo_fast.config import RunConfig
from tempo_fast.plan import work
from tempo_fast.plan.gpus import Gpu
from tempo_fast.plan.memory import Load, Memory, generation, memory, with_tokens
from tempo_fast.plan.record import Record, frames_of, from_pairs, with_words
from tempo_fast.plan.setting import Setting, buckets, setting_of
from tempo_fast.plan.shapes import Shape, load_shape
from tempo_fast.plan.states import trained_elements

HEADROOM = 0.97
"""Share of a device's memory that a run may plan to use: displays, monitors and drivers have the rest."""
CLIPS = 8
"""Assumed clips of a video that are captioned before its pairs are made."""
CAPTION = 80
"""Assumed tokens of a clip's caption."""


@dataclass(frozen=True)
class Question:
    """What is asked of a plan: the recipe's devices and data."""

    gpu: Gpu
    gpus: int = 1
    records: int = 0
    sft: int = 0
    pairs: Path | None = None
    seconds: float = 120.0
    width: int = 1280
    height: int = 720
    answer: float = 300.0
    words: int = 60
    mfu: float = work.MFU
    price: float = 0.0


@dataclass
class Choice:
    """One way to lay a training out over the ranks."""

    name: str
    setting: Setting
    memory: Memory
    asked: bool
    longest: int
    """Frames of the longest video that fits beside the rest."""


@dataclass
class Plan:
    config: RunConfig
    question: Question
    shape: Shape
    record: Record
    load: Load
    trained: int
    choices: list[Choice]
    sft: Memory | None
    generation: dict[str, float]
    stages: list[work.Stage]
    pair_hours: float
    necessary: float
    """Of one record, FLOP; ``run`` with what is computed again."""
    run: float
    gathered: float
    """Bytes that ZeRO-3 gathers on each rank per micro-batch."""
    assumptions: list[str] = field(default_factory=list)

    @property
    def hours(self) -> float:
        return sum(s.hours for s in self.stages) + self.pair_hours

    @property
    def cost(self) -> float:
        return self.hours * self.question.gpus * self.question.price


def make_plan(config: RunConfig, q: Question) -> Plan:
    """Raises InputError: an unknown model, a video that the rules refuse, a file without pairs."""
    config.validate()
    shape = load_shape(config.model.path)
    t = config.train
    rs = [r for stage in t.stages for r in _rs(stage)]
    notes = [*shape.notes]
    setting = setting_of(config, cuda=q.gpu.cuda, world=q.gpus)
    if q.pairs is not None:
        record, amounts = from_pairs(q.pairs, rs, config.video, shape, _counter(config.model.path))
    else:
        video = frames_of(config.video, shape.geometry, q.seconds, q.height, q.width)
        record = with_words(video, shape, q.words, 1 + len(config.pairs.kinds), q.answer)
        amounts = dict.fromkeys(rs, q.records)
        notes.append(
            f"a record: {q.seconds:g} s of {q.width}x{q.height}, {q.words} prompt tokens beside the video, 1 chosen and"
            f" {record.answers - 1} rejected answers of {q.answer:g} tokens (--seconds, --size, --words, --answer;"
            " --pairs reads them from a file)"
        )
    trained = trained_elements(shape, setting)
    load = load_of(shape, config, record, setting, max(amounts.values(), default=0))
    choices = [choice(config, shape, load, s, name, record) for name, s in _layouts(config, setting)]
    for c in choices:
        c.longest = longest(config, shape, load, c.setting, record, q.gpu)
    stages, sft, pair_hours, flop = _time(config, q, shape, record, setting, amounts, choices)
    batch = config.generation.batch_size
    prompt = _clip_tokens(config, shape) + q.words
    made = generation(shape, setting, batch, prompt + CAPTION)
    notes += _assumed(config, q, flop)
    live = 3.0 * setting.size * (shape.language + shape.embedding + (0 if shape.shared_head else shape.head))
    return Plan(
        config, q, shape, record, load, trained, choices, sft, made, stages, pair_hours, flop.necessary, flop.run, live,
        notes,
    )  # fmt: skip


def _rs(stage: Any) -> list[int]:
    return [stage.r] if isinstance(stage.r, int) else list(stage.r)


def _counter(path: str) -> Any:
    """Text to tokens by the model's tokenizer, where its directory has one."""
    from tempo_fast.models.load import TINYWORLD_BASE

    folder = TINYWORLD_BASE if path == "tinyworld" else Path(path)
    if not (folder / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def load_of(shape: Shape, config: RunConfig, record: Record, s: Setting, records: int, pairs: int = 0) -> Load:
    """The largest micro-batch of a rank: its share of a step's records, packed to ``train.max_tokens``."""
    t = config.train
    per_step = max(1, math.ceil((pairs or t.batch_size) / record.pairs))
    share = math.ceil(per_step / s.world)
    fit = max(1, min(share, t.max_tokens // max(1, record.tokens)))
    rows = record.rows(s.trees)
    filled = 0
    if not pairs and _needs_reference(config):
        filled = max(1, min(t.max_tokens // max(1, record.tokens), math.ceil((records or 1 << 30) / s.world)))
    return Load(
        tokens=fit * rows,
        responses=fit * record.responses,
        visual=fit * record.visual * (1 if s.trees else record.answers),
        patches=fit * record.patches * (1 if s.trees or not s.train_vision else record.answers),
        largest_video=record.patches,
        micros=math.ceil(share / fit),
        videos=records,
        feature_bytes=record.visual * shape.feature_width * s.size,
        fill_tokens=filled * record.tokens,
        fill_responses=filled * record.responses,
    )


def _layouts(config: RunConfig, s: Setting) -> list[tuple[str, Setting]]:
    """ZeRO-0, -2 and -3 with and without offloading; plain torch first on one device."""
    here = dataclasses.replace(s, offload_optimizer=False, offload_parameters=False)
    out = []
    if s.world == 1:
        out.append(("torch", dataclasses.replace(here, deepspeed=False, stage=0)))
    for stage in (0, 2, 3):
        base = dataclasses.replace(here, deepspeed=True, stage=stage)
        out.append((f"ZeRO-{stage}", base))
        if stage >= 2:
            there = dataclasses.replace(base, offload_optimizer=True, offload_parameters=stage == 3)
            out.append((f"ZeRO-{stage} offload", there))
    return out


def zero_section(config: RunConfig, shape: Shape, s: Setting) -> dict[str, Any]:
    """What DeepSpeed is given for this layout; empty without it."""
    if not s.deepspeed:
        return {}
    asked = config.train.deepspeed if (s.stage, *_offloaded(s)) == (config.train.zero_stage, *offloads(config)) else ""
    train = dataclasses.replace(
        config.train, engine="deepspeed", zero_stage=s.stage,  # type: ignore[arg-type]
        offload_optimizer=s.offload_optimizer, offload_parameters=s.offload_parameters, deepspeed=asked,
    )  # fmt: skip
    return buckets(train, trained_elements(shape, s))


def offloads(config: RunConfig) -> tuple[bool, bool]:
    """Whether the recipe, or its DeepSpeed file, keeps the optimizer and the parameters in CPU memory."""
    if config.train.engine != "deepspeed":
        return False, False
    section = buckets(config.train, 1)
    on = [section.get(name, {}).get("device") == "cpu" for name in ("offload_optimizer", "offload_param")]
    return on[0], on[1]


def _offloaded(s: Setting) -> tuple[bool, bool]:
    return s.offload_optimizer, s.offload_parameters


def choice(config: RunConfig, shape: Shape, load: Load, s: Setting, name: str, record: Record) -> Choice:
    t = config.train
    found = memory(shape, s, load, zero_section(config, shape, s), config.features, config.loader)
    asked = offloads(config) == _offloaded(s) and s.deepspeed == (t.engine == "deepspeed") and s.stage == t.zero_stage
    return Choice(name, s, found, asked, 0)


def longest(config: RunConfig, shape: Shape, load: Load, s: Setting, record: Record, gpu: Gpu) -> int:
    """Frames, of the record's size, of the longest video that a row of its own can hold in the device's memory; 0
    where not even the weights fit."""
    one = dataclasses.replace(
        load, tokens=record.rows(s.trees), responses=record.responses,
        visual=record.visual * (1 if s.trees else record.answers), patches=record.patches,
        fill_tokens=record.tokens if load.fill_tokens else 0, fill_responses=record.responses,
    )  # fmt: skip
    zero = zero_section(config, shape, s)
    limit = gpu.memory_gib * 2**30 * HEADROOM

    def fits(frames: int) -> bool:
        found = memory(shape, s, with_tokens(one, frames / record.frames), zero, config.features, config.loader)
        return found.device <= limit

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 1 << 24:
        low, high = high, 2 * high
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _time(
    config: RunConfig, q: Question, shape: Shape, record: Record, s: Setting, amounts: dict[int, int],
    choices: list[Choice],
) -> tuple[list[work.Stage], Memory | None, float, work.Flop]:  # fmt: skip
    t, speed = config.train, work.rate(q.gpu, s, q.mfu)
    held = config.features.disk != "" or config.features.memory_gib * 2**30 >= max(amounts.values(), default=0) * (
        record.visual * shape.feature_width * s.size
    )
    first = work.flop_of(shape, record, s)
    later = work.flop_of(shape, record, s, encoded=0.0 if held and not s.train_vision else 1.0)
    stages: list[work.Stage] = []
    needs = _needs_reference(config)
    for i, stage in enumerate(t.stages):
        n = sum(amounts.get(r, 0) for r in _rs(stage))
        n = round(n / (1 - getattr(stage, "replay", 0.0)))
        if not n:
            continue
        name = f"stage{i + 1}_r{'+'.join(map(str, _rs(stage)))}"
        if needs:
            known = 0 if i == 0 or config.reference.mode == "previous_stage" else 1
            part = dataclasses.replace(record, answers=record.answers - known)
            stages.append(work.fill_stage(f"{name} fill", n, part, work.flop_of(
                shape, part, s, encoded=1.0 if i == 0 or not held else 0.0), s, speed))  # fmt: skip
        flop = later if needs or i else first
        stages.append(work.train_stage(
            name, n, stage.epochs, t.batch_size, record, flop, s, speed, getattr(stage, "max_steps", 0)
        ))  # fmt: skip
    sft_memory = None
    if q.sft and t.sft.epochs:
        tuned = setting_of(config, cuda=q.gpu.cuda, world=q.gpus, sft=True)
        one = dataclasses.replace(record, answers=1)
        load = load_of(shape, config, one, tuned, q.sft, t.sft.batch_size)
        sft_memory = memory(shape, tuned, load, zero_section(config, shape, tuned), config.features, config.loader)
        flop = work.flop_of(shape, one, tuned)
        stages.append(work.train_stage(
            "sft", q.sft, t.sft.epochs, t.sft.batch_size, one, flop, tuned, speed, t.sft.max_steps
        ))  # fmt: skip
        if t.sft.control:
            stages.append(dataclasses.replace(stages[-1], name="control"))
    return stages, sft_memory, _pair_hours(config, q, shape, record, s, amounts), first


def _needs_reference(config: RunConfig) -> bool:
    from tempo_kernels.objectives import make_objective

    return make_objective(config.train.objective.name, **config.train.objective.options).needs_reference


def _clip_tokens(config: RunConfig, shape: Shape) -> int:
    """Visual tokens of a clip: its two keyframes, at most video.max_pixels each."""
    from tempo_fast.plan.record import resized

    return resized(config.video, shape.geometry, shape.geometry.temporal, 720, 1280).visual


def _pair_hours(
    config: RunConfig, q: Question, shape: Shape, record: Record, s: Setting, amounts: dict[int, int]
) -> float:
    """Making pairs: captions of clips and an answer per description (temple), or an answer per question and sample."""
    g, p = config.generation, config.pairs
    if q.pairs is not None or g.engine == "openai" or not amounts:
        return 0.0
    videos = max(amounts.values())
    batch = g.batch_size
    args = (shape, s, q.gpu, q.mfu)
    if p.method == "temple":
        texts = 1 + len(p.kinds) * len(p.r)
        whole = p.perturb_on == "frames" and p.frames_answer == "video"
        hours = work.answers_hours(*args, videos * texts, record.prompt if whole else CLIPS * CAPTION, q.answer, batch)
        if not whole:
            hours += work.answers_hours(*args, videos * CLIPS, _clip_tokens(config, shape) + q.words, CAPTION, batch)
    else:
        drawn = p.mdpo.samples if p.method == "mdpo" else record.answers
        hours = work.answers_hours(*args, videos * drawn, record.prompt, q.answer, batch)
    return hours / q.gpus


def _assumed(config: RunConfig, q: Question, flop: work.Flop) -> list[str]:
    peak = q.gpu.tflops(4 if config.model.dtype == "float32" else 2)
    told = [
        f"speed: {q.mfu:.0%} of {q.gpu.name}'s {peak:g} TFLOP/s in {config.model.dtype}, of all FLOP that run"
        f" (--mfu; {q.mfu * flop.necessary / flop.run:.0%} without what is computed again); not measured",
        "speed leaves out communication, decoding that the step waits for, start-up and checkpoints",
    ]
    if q.gpu.cuda:
        from tempo_fast.plan.memory import CONTEXT_GIB, FRAGMENTATION, NCCL_GIB

        told.append(
            f"memory: {CONTEXT_GIB} GiB of CUDA context{f' and {NCCL_GIB} of NCCL' if q.gpus > 1 else ''}, and"
            f" {FRAGMENTATION:.0%} that the allocator cannot use"
        )
    if q.pairs is None and config.generation.engine != "openai":
        told.append(
            f"pairs: {CLIPS} clips a video, captions of {CAPTION} tokens; decoding at {work.DECODE:.0%} of the"
            f" memory's {q.gpu.bandwidth:g} TB/s, batches of {config.generation.batch_size} always full"
        )
    return told
