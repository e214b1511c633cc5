"""``python -m bench generate``: captions of videos, tokens and videos per second.

A model of random weights (those of ``bench step``) answers --requests prompts, each about videos of its own. A case
``window`` shows two clips of two key frames, as a caption of curated clips does; ``video`` a whole video, the shape's
prefix. Random weights end no answer, so its length is the limit of its request: equal, or drawn from a Pareto
distribution (--lengths), the same for every side, about as long as captions are unequal. Nothing is decoded; with
--vision ``encoded`` every run sends the videos through the tower again, with ``cached`` their features are there.

``continuous`` is the transformers engine: finished answers leave the batch and waiting ones enter. ``static`` is the
same code when none may enter before all others are finished. ``generate`` is transformers' own ``generate`` on
left-padded batches in the same order. ``vllm`` is vLLM with weights of its own making (load_format ``dummy``), where it
is installed; its vision is always encoded.

``tokens`` are those of answers. ``over`` is the rate over that of ``generate`` and ``static``. ``different`` counts the
answers whose tokens are not those of ``generate`` (greedy, so that only rounding at a tie can tell them apart; not
counted for vLLM's own weights).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.measure import Deadline, Laps, Marks, environment, orders, peak_mib, synchronize, table, write
from bench.steps.shapes import SHAPES, Reader, Shape, Video, make_bundle, make_config, make_tokenizer
from tempo_fast.config import GenerationConfig
from tempo_fast.generation import Request
from tempo_fast.generation.decoding import MAX_BATCH_TOKENS, Answer, left_pad
from tempo_fast.generation.transformers_engine import TransformersEngine
from tempo_fast.models.family import Grid
from tempo_fast.trees.layout import prompt_of
from tempo_fast.trees.vision import FeatureCache

Row = dict[str, Any]
IMPLS = ("continuous", "static", "generate", "vllm")
RIVALS = ("generate", "static")
NO_TIME = "no time left"
WINDOW = {"7b": Grid(1, 44, 46), "tiny": Grid(1, 8, 8), "micro": Grid(1, 4, 4)}
"""A clip of the case ``window``: two frames of at most 512 * 28 * 28 pixels (TEMPLE's), smaller for small models."""
COLUMNS = (
    "case", "lengths", "vision", "impl", "requests", "tokens", "tokens_per_s", "videos_per_s", "ms", "ms_min", "ms_max",
    "over.generate", "over.static", "steps", "different", "peak_mib",
)  # fmt: skip


def lengths_of(kind: str, mean: int, n: int) -> list[int]:
    """Limits of n answers: ``mean``, or Pareto (shape 1.2) from a quarter of it, cut at six times."""
    rng = random.Random(0)
    return [
        mean if kind == "equal" else min(6 * mean, max(1, int(mean / 4 * rng.paretovariate(1.2)))) for _ in range(n)
    ]


def requests_of(case: str, shape: Shape, bundle: Any, lengths: Sequence[int]) -> list[Request]:
    """A request about videos of its own for each length."""
    out = []
    for i, limit in enumerate(lengths):
        if case == "window":
            plans, words = [Video(f"w{i}.{k}", WINDOW[shape.name]) for k in range(2)], 30
        else:
            plans = [Video(f"v{i}", shape.grid)]
            bare = prompt_of(bundle.family, bundle.tokenizer, bundle.config, "", plans)
            words = max(1, shape.prefix - len(bare.input_ids))
        out.append(Request(plans, " a" * words, limit))
    return out


class Rig:
    """A model and its sides; each takes requests and returns the tokens of the answers."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype, batch_size: int) -> None:
        self.shape, self.device, self.batch_size = shape, device, batch_size
        self.bundle = make_bundle(shape, device, dtype)
        self.bundle.model = self.bundle.model.unload()  # type: ignore[operator]
        self.bundle.model.eval()
        self.reader = Reader(self.bundle.device, dtype)
        self.cached = FeatureCache(max_bytes=1 << 40)
        self.vision = "cached"
        self.steps: int | None = None

    def engine(self) -> TransformersEngine:
        features = self.cached if self.vision == "cached" else FeatureCache()
        config = GenerationConfig(batch_size=self.batch_size)
        return TransformersEngine(config, self.bundle, self.reader, features, 0)

    def decoded(self, requests: Sequence[Request], static: bool) -> list[list[int]]:
        engine = self.engine()
        decoder = engine.decoder(requests)
        decoder.static, decoder.stops = static, frozenset()
        tokens: list[list[int]] = [[] for _ in requests]
        for answer in decoder.run(engine._answers(requests)):
            tokens[answer.index] = answer.tokens
        self.steps = decoder.steps
        return tokens

    def continuous(self, requests: Sequence[Request]) -> list[list[int]]:
        return self.decoded(requests, static=False)

    def static(self, requests: Sequence[Request]) -> list[list[int]]:
        return self.decoded(requests, static=True)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        from transformers import GenerationConfig as HFGenerationConfig

        b, engine = self.bundle, self.engine()
        tokens: list[list[int]] = [[] for _ in requests]
        pad = b.tokenizer.pad_token_id
        for batch in _batches(engine._answers(requests), self.batch_size):
            ids, positions, mask, visual = (x.to(b.device) for x in left_pad([a.prompt for a in batch], pad))
            plans = [plan for a in batch for plan in requests[a.index].plans]
            features = engine.features.features(b.family, b.model, self.reader, plans, together=False)
            cache = b.family.new_cache(b.model)
            b.family.hidden_states(
                b.model, ids[:, :-1], positions[..., :-1], mask[:, :-1], visual[:, :-1], features, cache
            )
            config = HFGenerationConfig(
                do_sample=False, num_beams=1, top_k=None, max_new_tokens=max(a.limit for a in batch), use_cache=True,
                eos_token_id=None, pad_token_id=pad,
            )  # fmt: skip
            out = b.family.generate_model(b.model).generate(
                input_ids=ids, past_key_values=cache, position_ids=b.family.model_positions(positions),
                attention_mask=mask, generation_config=config,
            )  # fmt: skip
            for a, row in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
                tokens[a.index] = row[: a.limit]
        self.steps = None
        return tokens


def _batches(answers: Sequence[Answer], size: int) -> list[list[Answer]]:
    batches: list[list[Answer]] = []
    for a in answers:
        last = batches[-1] if batches else None
        room = last and (len(last) + 1) * max(len(x.prompt.input_ids) for x in [*last, a]) <= MAX_BATCH_TOKENS
        if last and room and len(last) < size:
            last.append(a)
        else:
            batches.append([a])
    return batches


class VLLM:
    """vLLM on the shape's configuration; the pictures are noise of the planned size."""

    def __init__(self, shape: Shape, bundle: Any, folder: Path, batch_size: int, memory: float) -> None:
        from vllm import LLM

        tokenizer = make_tokenizer()
        config = make_config(shape, tokenizer)
        config.architectures = [bundle.family.model_class]
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        pixels = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 784, "max_pixels": 1 << 24}
        processor = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}[config.model_type]
        for name, key, kind in (("", "image", "Qwen2VLImageProcessor"), ("video_", "video", "Qwen2VLVideoProcessor")):
            found = {**pixels, f"{key}_processor_type": kind, "processor_class": processor}
            (folder / f"{name}preprocessor_config.json").write_text(json.dumps(found))
        self.bundle = bundle
        self.timed = bundle.family.timed
        self.llm = LLM(
            model=str(folder), load_format="dummy", dtype=str(bundle.dtype).removeprefix("torch."),
            max_num_seqs=batch_size, max_model_len=min(32768, 2 * shape.prefix + 8 * shape.answer + 512),
            limit_mm_per_prompt={"video": 2, "image": 0}, enable_prefix_caching=False, gpu_memory_utilization=memory,
            mm_processor_kwargs={"do_resize": False, "do_sample_frames": False},
        )  # fmt: skip

    def __call__(self, requests: Sequence[Request]) -> list[list[int]]:
        from vllm import SamplingParams

        inputs, parameters = [], []
        for r in requests:
            videos = [self._video(plan) for plan in r.plans]
            text = self.bundle.family.chat(self.bundle.tokenizer, r.prompt, len(r.plans), ())
            inputs.append({"prompt": text, "multi_modal_data": {"video": videos}})
            parameters.append(SamplingParams(temperature=0, max_tokens=r.max_new_tokens, ignore_eos=True))
        found = self.llm.generate(inputs, parameters, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in found]

    def _video(self, plan: Video) -> Any:
        frames, (_, h, w) = 2 * plan.grid.t, plan.grid
        seed = sum(map(ord, plan.key))
        pixels = torch.randint(
            0, 255, (frames, 14 * h, 14 * w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        if not self.timed:
            return pixels.numpy()
        return pixels.numpy(), {
            "fps": 2.0, "duration": frames / 2, "total_num_frames": frames, "frames_indices": list(range(frames)),
            "video_backend": "opencv", "do_sample_frames": False,
        }  # fmt: skip


def measure_case(
    rig: Rig, vllm: VLLM | None, case: str, lengths: str, args: argparse.Namespace, deadline: Deadline | None
) -> list[Row]:
    """A row per side; after the deadline no side starts, and the repetitions end with their round."""
    requests = requests_of(
        case, rig.shape, rig.bundle, lengths_of(lengths, args.answer or rig.shape.answer, args.requests)
    )
    tokens = sum(r.max_new_tokens or 0 for r in requests)
    videos = sum(len(r.plans) for r in requests)
    rows: list[Row] = []
    running: list[tuple[Row, Callable[[Sequence[Request]], list[list[int]]]]] = []
    want: list[list[int]] | None = None
    for name in sorted(args.impls, key=lambda n: n != "generate"):
        row: Row = {
            "case": case, "lengths": lengths, "vision": "encoded" if name == "vllm" else rig.vision, "impl": name,
            "requests": len(requests), "videos": videos, "tokens": tokens, "batch_size": args.batch_size,
            "dtype": args.dtype, "prompt": len(prompt_of(rig.bundle.family, rig.bundle.tokenizer, rig.bundle.config,
                                                         requests[0].prompt, requests[0].plans).input_ids),
        }  # fmt: skip
        rows.append(row)
        if deadline is not None and deadline.left() <= 0:
            row["skipped"] = NO_TIME
            continue
        if name == "vllm" and vllm is None:
            row["skipped"] = "vllm is not installed"
            continue
        side = vllm if name == "vllm" else getattr(rig, name)
        assert side is not None
        try:
            found = side(requests)
            row["peak_mib"] = None if name == "vllm" else peak_mib(lambda s=side: s(requests), rig.device)
        except torch.OutOfMemoryError as problem:
            row["skipped"] = f"out of memory: {str(problem).splitlines()[0]}"
            continue
        assert [len(t) for t in found] == [r.max_new_tokens for r in requests]
        want = found if name == "generate" else want
        if name != "vllm":
            row["steps"] = rig.steps
            if want is not None:
                row["different"] = sum(a != b for a, b in zip(found, want, strict=True))
        running.append((row, side))
        _free(rig.device)
    laps = [Laps() for _ in running]
    for order in orders(len(running), args.repetitions):
        for i in order:
            synchronize(rig.device)
            marks = Marks(rig.device)
            marks.mark()
            running[i][1](requests)
            marks.mark()
            marks.lap(laps[i], 0, 1)
        if deadline is not None and deadline.left() <= 0:
            break
    for (row, _), found_laps in zip(running, laps, strict=True):
        row |= {"repetitions": len(found_laps.wall), **found_laps.summary()}
        row["tokens_per_s"], row["videos_per_s"] = 1e3 * tokens / row["ms"], 1e3 * videos / row["ms"]
    done = {row["impl"]: row for row, _ in running}
    for row in done.values():
        row["over"] = {name: done[name]["ms"] / row["ms"] for name in RIVALS if name in done}
    return sorted(rows, key=lambda row: args.impls.index(row["impl"]))


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench generate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), help="default: tiny on a CPU, 7b on CUDA")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", help="also write the rows to this file, as they come")
    parser.add_argument("--impls", nargs="+", choices=IMPLS, default=list(IMPLS))
    parser.add_argument("--cases", nargs="+", choices=("window", "video"), default=["window"])
    parser.add_argument("--lengths", nargs="+", choices=("equal", "unequal"), default=["unequal"])
    parser.add_argument("--vision", nargs="+", choices=("cached", "encoded"), default=["encoded"])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16, help="answers in progress (default 16)")
    parser.add_argument("--answer", type=int, default=0, help="mean length of answers; default: the shape's")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--minutes", type=float, default=0.0, help="start no side after this long; 0 is no limit")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    args.shape = args.shape or ("7b" if args.device == "cuda" else "tiny")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if SHAPES[args.shape].cuda_only and args.device != "cuda":
        parser.error(f"--shape {args.shape} needs --device cuda")
    if min(args.requests, args.batch_size, args.repetitions) < 1:
        parser.error("--requests, --batch_size and --repetitions must be at least 1")
    return args


def report(rows: Sequence[Row]) -> str:
    """What was measured, and what did not run."""
    lines = [f"skipped {row['case']} {row['impl']}: {row['skipped']}" for row in rows if "skipped" in row]
    return "\n\n".join([table([row for row in rows if "ms" in row], COLUMNS), "\n".join(lines)])


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    env = environment(args.device)
    deadline = Deadline(60 * args.minutes) if args.minutes else None
    shape, rows = SHAPES[args.shape], list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        vllm = None
        if "vllm" in args.impls and find_spec("vllm") is not None:
            from tempo_fast.models import get_family

            kind = make_config(shape, make_tokenizer()).model_type
            told = SimpleNamespace(
                family=get_family(kind), dtype=getattr(torch, args.dtype), tokenizer=make_tokenizer()
            )
            # it reserves a share of the memory, whether it needs it or not: the other sides come after it
            vllm = VLLM(shape, told, Path(folder), args.batch_size, 0.45 if len(args.impls) > 1 else 0.7)
        rig = Rig(shape, args.device, getattr(torch, args.dtype), args.batch_size)
        for rig.vision in args.vision:
            for case in args.cases:
                for lengths in args.lengths:
                    rows += measure_case(rig, vllm, case, lengths, args, deadline)
                    write(args.json, env, rows)
    print(f"{args.shape}: {args.requests} requests, {args.batch_size} at a time, {args.dtype}, {env['machine']}")
    print(report(rows))
    return 0
