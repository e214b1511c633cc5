"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from tempo_fast.plan.memory import Memory
from tempo_fast.plan.plan import HEADROOM, Choice, Plan
from tempo_fast.plan.shapes import Shape

PARTS = ("weights", "gradients", "optimizer", "activations", "loss head", "features", "overhead")
GIB = 2**30


def as_text(plan: Plan) -> str:
    """What a person reads."""
    q, shape, record = plan.question, plan.shape, plan.record
    devices = f"{q.gpus} x {q.gpu.name} ({q.gpu.memory_gib:.0f} GiB each)"
    blocks = [
        "\n".join([f"plan of {shape.name} on {devices}", *_model(plan), *_record(plan)]),
        _memory(plan),
        _generation(plan),
        _time(plan),
        "\n".join(["assumptions", *(f"  - {note}" for note in plan.assumptions)]),
    ]
    if not record.visual:
        blocks[0] += "\n  (no video)"
    return "\n\n".join(block for block in blocks if block)


def _model(plan: Plan) -> list[str]:
    shape, t = plan.shape, plan.config.train
    how = f"LoRA r {t.lora.r}" if t.tune == "lora" else "the model itself"
    tied = " (the embedding)" if shape.shared_head else ""
    return [
        f"  parameters  {_count(shape.total)}: language {_count(shape.language)}, embedding {_count(shape.embedding)},"
        f" head {_count(shape.head)}{tied}, vision {_count(shape.vision)}",
        f"  trained     {_count(plan.trained)} ({how}, {plan.trained / shape.total:.2%})",
    ]


def _record(plan: Plan) -> list[str]:
    r, load, t = plan.record, plan.load, plan.config.train
    lines = [
        f"  record      {r.frames} frames of {r.width}x{r.height}: {r.visual} visual tokens + {r.words} of text"
        f" + {r.answers} answers of {r.answer:.0f} = {r.tokens}",
        f"  row         {load.tokens} tokens a micro-batch, {load.micros} a step and rank; train.max_tokens"
        f" {t.max_tokens}",
    ]
    if r.tokens > t.max_tokens:
        lines.append(
            f"  warning     a record is longer than train.max_tokens by {r.tokens - t.max_tokens}: training refuses it;"
            " lower video.total_pixels or video.max_frames, or raise the budget"
        )
    if r.longest > r.visual:
        lines.append(f"  longest     {r.longest} visual tokens among the videos looked at")
    return lines


def _memory(plan: Plan) -> str:
    t, limit = plan.config.train, plan.question.gpu.memory_gib * GIB * HEADROOM
    how = t.gradient_checkpointing if isinstance(t.gradient_checkpointing, str) else str(t.gradient_checkpointing)
    head = ["", *PARTS, "sum", "when", "host", "fits", "longest video"]
    rows = [_row(plan, c, limit) for c in plan.choices]
    lines = _aligned([head, *rows])
    title = f"memory per rank at its highest, GiB ({plan.config.model.dtype}, checkpointing {how}; * the recipe)"
    if plan.sft is not None:
        lines.append(f"sft: {plan.sft.device / GIB:.1f} GiB, {_biggest(plan.sft)}")
    lines.append(_advice(plan, limit))
    if any(c.setting.stage == 3 for c in plan.choices) and plan.question.gpus > 1:
        lines.append(
            f"ZeRO-3 moves {plan.gathered / 1e9:.0f} GB to every rank per micro-batch (weights in forward, again and"
            " backward)"
        )
    return "\n".join([title, *(f"  {line}" for line in lines if line)])


def _row(plan: Plan, c: Choice, limit: float) -> list[str]:
    gib = [f"{c.memory.parts.get(part, 0.0) / GIB:.2f}" for part in PARTS]
    host = c.memory.on_host / GIB
    video = f"{c.longest} frames" if c.longest else "-"
    if c.longest:
        video += f" ({c.longest / plan.config.video.fps / 60:.1f} min)"
    fits = "yes" if c.memory.device <= limit else "no"
    return [
        f"{'*' if c.asked else ' '} {c.name}",
        *gib,
        f"{c.memory.device / GIB:.2f}",
        c.memory.phase,
        f"{host:.1f}",
        fits,
        video,
    ]


def _biggest(memory: Memory) -> str:
    name = max(memory.parts, key=lambda k: memory.parts[k])
    return f"most of it {name} ({memory.parts[name] / GIB:.1f})"


def _advice(plan: Plan, limit: float) -> str:
    asked = next((c for c in plan.choices if c.asked), None)
    v, t, r = plan.config.video, plan.config.train, plan.record
    limits = [
        f"train.max_tokens allows {max(0, t.max_tokens - r.words - r.responses)} visual tokens a record",
        f"video.max_frames {v.max_frames}",
    ]
    if not plan.shape.geometry.side:
        limits.append(f"video.total_pixels {v.total_pixels} shrinks the frames of longer videos")
    line = "longest video: by memory alone, frames as large as above; " + ", ".join(limits)
    if asked is not None and asked.memory.device > limit:
        fitting = [c.name for c in plan.choices if c.memory.device <= limit]
        line += f"\n  {asked.name} does not fit; " + (f"these do: {', '.join(fitting)}" if fitting else "none does")
    return line


def _generation(plan: Plan) -> str:
    parts = plan.generation
    if plan.question.pairs is not None or plan.config.generation.engine != "transformers":
        return ""
    told = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items())
    return f"making pairs, GiB on each device: {told} ({plan.config.generation.batch_size} prompts at once)"


def _time(plan: Plan) -> str:
    if not plan.stages:
        return "no time or cost without data: give --records N or --pairs FILE"
    q = plan.question
    head = ["", "records", "steps", "tokens a step", "step s", "tokens/s", "ranks busy", "hours"]
    head += ["cost"] if q.price else []
    rows = [head]
    each = q.gpus * q.price
    if plan.pair_hours:
        rows.append(_timed("pairs", "", "", "", "", "", "", plan.pair_hours, each))
    for s in plan.stages:
        step = (str(s.steps), f"{s.tokens_per_step:.0f}", f"{s.step_s:.2f}") if s.steps else ("", "", "")
        rows.append(_timed(s.name, str(s.records), *step, f"{s.tokens_per_s:.0f}", f"{s.busy:.0%}", s.hours, each))
    rows.append(_timed("together", "", "", "", "", "", "", plan.hours, each))
    lines = [f"time, estimated from FLOP{f', cost at {q.price:g} USD a device hour' if q.price else ''}"]
    lines += [f"  {line}" for line in _aligned(rows)]
    idle = [s for s in plan.stages if s.steps and s.busy < 0.9]
    if idle:
        s = idle[0]
        n = round(s.tokens_per_step / max(1, plan.record.rows(plan.config.train.trees)))
        lines.append(
            f"  {s.name}: a step's {n} records leave {1 - s.busy:.0%} of {q.gpus} ranks idle; a batch size of which"
            " each rank gets the same would not"
        )
    return "\n".join(lines)


def _timed(name: str, records: str, steps: str, tokens: str, step: str, rate: str, busy: str, hours: float,
           each: float) -> list[str]:  # fmt: skip
    return [name, records, steps, tokens, step, rate, busy, f"{hours:.2f}", *([f"{hours * each:.0f}"] if each else [])]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]


def _count(n: float) -> str:
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.2f} {name}"
    return f"{n:.0f}"


def as_json(plan: Plan) -> dict[str, Any]:
    """The same for scripts; bytes, seconds, hours, USD."""
    q, r = plan.question, plan.record
    return {
        "model": _shape(plan.shape) | {"trained": plan.trained},
        "devices": {"gpu": dataclasses.asdict(q.gpu), "gpus": q.gpus, "price": q.price, "mfu": q.mfu},
        "record": {
            **dataclasses.asdict(r), "grid": list(r.grid), "tokens": r.tokens, "prompt": r.prompt,
            "responses": r.responses,
        },
        "load": dataclasses.asdict(plan.load),
        "memory": [
            {
                "name": c.name, "asked": c.asked, "bytes": c.memory.device, "phase": c.memory.phase,
                "parts": c.memory.parts, "phases": c.memory.phases,
                "host": c.memory.host,
                "fits": c.memory.device <= q.gpu.memory_gib * GIB * HEADROOM, "longest_frames": c.longest,
            }
            for c in plan.choices
        ],
        "sft_memory": None if plan.sft is None else {"bytes": plan.sft.device, "parts": plan.sft.parts},
        "generation_memory": plan.generation,
        "flop_per_record": {"necessary": plan.necessary, "run": plan.run},
        "stages": [dataclasses.asdict(s) for s in plan.stages],
        "pair_hours": plan.pair_hours,
        "hours": plan.hours,
        "cost": plan.cost,
        "assumptions": plan.assumptions,
    }  # fmt: skip


def _shape(s: Shape) -> dict[str, Any]:
    return {
        "name": s.name, "family": s.family.name, "total": s.total, "language": s.language, "embedding": s.embedding,
        "head": s.head, "vision": s.vision, "shared_head": s.shared_head,
    }  # fmt: skip
