"""``python -m bench store``: what reading and opening the store of reference statistics costs, and what smaller forms
of it would cost in exactness.

Parts. ``read``: answers with what the KL needs from files in the page cache, beside torch's copy of as many bytes; new
memory for ``get`` and ``clone``, the same memory again for ``read_into`` and ``copy_``. ``cold``: the time that steps
of --step-ms wait for their answers after the files were put out of the page cache, read when asked for or ahead.
``open``: a store of many small shards, opened and verified, before and after ``gc``. ``step``: training steps with the
KL, the share of their time that they wait for the store, and the CPU time of reading by that of the step. ``forms``:
relative error of the KL (mean) and of its gradient (norms) against float64 for ways to keep what it needs. ``over`` is
the speed by that of the copy, ``over_cpu`` the same by CPU time, for a machine that others load.

Shapes: N response tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.measure import Laps, environment, orders, table, write
from tempo_fast.reference.ahead import ReadAhead
from tempo_fast.reference.collect import collect
from tempo_fast.reference.store import ReferenceStore
from tempo_kernels.head import HeadStatistics, head_statistics, linear_logp
from tempo_kernels.oracle import oracle

PARTS = ("read", "cold", "open", "step", "forms")
COLUMNS = (
    "case", "impl", "shape", "ms", "ms_min", "ms_max", "ms_cpu", "gb_s", "over", "over_cpu", "wait_ms", "wait_share",
    "cpu_share", "bytes_per_token", "error",
)  # fmt: skip
Row = dict[str, Any]
BRANCHES = 4
"""Answers of a tree; they lie side by side in a shard."""
FORMS_SHAPE = (48, 16384, 512)
"""N, V, D of ``forms``."""


def fill_store(root: Path, tokens: int, d: int, answers_per_shard: int = 32) -> tuple[ReferenceStore, list[list[str]]]:
    """A store of answers of 20 to 120 tokens with mean embeddings, ``tokens`` in all; keys by tree."""
    g = torch.Generator().manual_seed(0)
    store = ReferenceStore(root, {"reference": "bench"})
    trees: list[list[str]] = []
    left = tokens
    while left > 0:
        entries = {}
        while left > 0 and len(entries) < answers_per_shard:
            n = min(left, int(torch.randint(20, 121, (1,), generator=g)))
            left -= n
            if len(entries) % BRANCHES == 0:
                trees.append([])
            key = f"{len(trees)}.{len(entries)}"
            trees[-1].append(key)
            entries[key] = HeadStatistics(*(torch.randn(n, *shape) for shape in ((), (), (), (d,))))
        store.put(entries)
    order = torch.randperm(len(trees), generator=g).tolist()
    return store, [trees[i] for i in order]


def timed(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, Laps]:
    """Each once to warm up, then interleaved."""
    names, laps = list(calls), {name: Laps() for name in calls}
    for call in calls.values():
        call()
    for order in orders(len(names), repetitions):
        for i in order:
            begin, cpu = time.perf_counter(), time.process_time()
            found = calls[names[i]]()
            laps[names[i]].wall.append(1e3 * (time.perf_counter() - begin))
            laps[names[i]].cpu.append(1e3 * (time.process_time() - cpu))
            del found
    return laps


def read_part(args: argparse.Namespace, root: Path) -> Iterator[Row]:
    store, trees = fill_store(root, args.tokens, args.hidden)
    keys = [key for tree in trees for key in tree]
    assert not store.missing(keys, kl=True)
    source = store.get(keys, kl=True)
    buffers: dict[tuple[int, ...], list[Tensor]] = {}
    taken: dict[tuple[int, ...], int] = {}

    def again(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The same memory for the i-th tensor of a shape in every call."""
        i = taken[shape] = taken.get(shape, -1) + 1
        known = buffers.setdefault(shape, [])
        if len(known) <= i:
            known.append(torch.zeros(shape, dtype=dtype))
        return known[i]

    def read_into() -> object:
        taken.clear()
        return store.read(keys, kl=True, empty=again)

    target = [torch.zeros_like(x) for x in source]
    laps = timed(
        {
            "clone": lambda: [x.clone() for x in source],
            "get": lambda: store.get(keys, kl=True),
            "copy_": lambda: [a.copy_(b) for a, b in zip(target, source, strict=True)],
            "read_into": read_into,
        },
        args.repetitions,
    )
    size = sum(x.numel() * x.element_size() for x in source)
    for impl, base in (("clone", "clone"), ("get", "clone"), ("copy_", "copy_"), ("read_into", "copy_")):
        found = laps[impl].summary()
        yield {
            "case": "read", "impl": impl, "shape": [len(keys), args.tokens, args.hidden], "dtype": "float32",
            "repetitions": args.repetitions, **found, "gb_s": size / found["ms"] / 1e6,
            "over": laps[base].summary()["ms"] / found["ms"],
            "over_cpu": laps[base].summary()["ms_cpu"] / found["ms_cpu"],
        }  # fmt: skip


def forget_pages(root: Path) -> None:
    """Put a folder's files out of the page cache (those that no process has mapped)."""
    for path in root.rglob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


class _Named:
    """As much of a response tree as the store asks for: its keys."""

    def __init__(self, keys: list[str]) -> None:
        self.id, self.branches = keys[0], keys


def cold_part(args: argparse.Namespace, root: Path) -> Iterator[Row]:
    _, keys = fill_store(root, args.tokens, args.hidden)
    trees: list[Any] = [_Named(row) for row in keys]
    micros = [trees[i : i + 4] for i in range(0, len(trees), 4)]
    waits: dict[str, list[float]] = {"when_asked": [], "ahead": []}
    for order in orders(2, max(1, args.repetitions // 3)):
        for i in order:
            impl = list(waits)[i]
            store = ReferenceStore(root, {"reference": "bench"})
            store.kl = True
            store.trust(store.shards_of([k for row in keys for k in row]))
            forget_pages(root)
            with mock.patch.object(ReferenceStore, "keys", lambda self, tree: tree.branches):
                ahead = ReadAhead(store, iter(micros) if impl == "ahead" else None)
                for micro in micros:
                    begin = time.perf_counter()
                    ahead.get(micro)
                    waits[impl].append(1e3 * (time.perf_counter() - begin))
                    time.sleep(args.step_ms / 1e3)
                ahead.close()
            del ahead, store
    for impl, found in waits.items():
        mean = sum(found) / len(found)
        yield {
            "case": "cold", "impl": impl, "shape": [len(micros), args.tokens, args.hidden], "repetitions": len(found),
            "wait_ms": mean, "ms": median(found), "ms_max": max(found), "wait_share": mean / (mean + args.step_ms),
        }  # fmt: skip


def open_part(args: argparse.Namespace, root: Path) -> Iterator[Row]:
    n, each = args.shards, 20
    with mock.patch("os.fsync", lambda fd: None):  # of making it, which is not measured
        made = ReferenceStore(root, {"reference": "bench"})
        for i in range(n):
            entries = {f"{i:050d}.{j:013d}": HeadStatistics(torch.randn(30), torch.randn(30)) for j in range(each)}
            made.put(entries)
        del made
    for impl in ("small_shards", "after_gc"):
        if impl == "after_gc":
            collect(root)
        laps: dict[str, list[float]] = {"open": [], "verify": []}
        for _ in range(args.repetitions):
            begin = time.perf_counter()
            store = ReferenceStore(root, {"reference": "bench"})
            laps["open"].append(1e3 * (time.perf_counter() - begin))
            keys = store.known(kl=False)
            assert len(keys) == n * each
            begin = time.perf_counter()
            assert not store.missing(keys)
            laps["verify"].append(1e3 * (time.perf_counter() - begin))
            del store  # gc leaves alone what is in use
        shards = len(list((root / "shards").iterdir()))
        for what, found in laps.items():
            yield {
                "case": what, "impl": impl, "shape": [n * each, shards], "repetitions": args.repetitions,
                "ms": median(found), "ms_min": min(found), "ms_max": max(found),
            }  # fmt: skip


def step_part(args: argparse.Namespace, root: Path) -> Iterator[Row]:
    from bench.steps.shapes import SHAPES
    from bench.steps.sides import Rig
    from tempo_fast.reference.fill import fill
    from tempo_fast.reference.shard import form_of
    from tempo_fast.training.data import branch_batch
    from tempo_fast.training.module import TrainModule
    from tempo_fast.trees.batch import collate
    from tempo_kernels.objectives import make_objective

    rig = Rig(SHAPES[args.shape], "cpu", torch.float32, policy="full", cached_vision=True, attention="auto")
    rig.load(4, BRANCHES - 1)
    trees = [item.tree for item in rig.items]
    module = TrainModule(rig.bundle.model, rig.bundle.family, make_objective("rrpo", beta=0.1, alpha=0.01))
    for keep in ("mean_embedding", "hidden"):
        store = ReferenceStore(root / keep, {"reference": "bench"}, form=form_of(keep, torch.float32))
        store.kl = True
        fill(rig.bundle, store, trees, rig.reader, rig.cache, kl=True, max_tokens=16384)
        micros = [[rig.items[i % len(rig.items)]] for i in range(args.repetitions + 2)]
        ahead = ReadAhead(store, ([item.tree for item in micro] for micro in micros))
        wall, waits, cpu = [], [], []
        for number, micro in enumerate(micros):
            begin, began = time.perf_counter(), time.process_time()
            reference = ahead.get([item.tree for item in micro])
            waited = time.perf_counter() - begin
            packed = collate([item.tree for item in micro], rig.bundle.device)
            batch, kinds = branch_batch(micro, packed)
            features = rig.cache.features(rig.bundle.family, rig.bundle.model, rig.reader, packed.plans)
            loss, _ = module(packed, batch, kinds, features=features, reference=reference)
            loss.backward()
            if number >= 2:  # the first warm up
                wall.append(1e3 * (time.perf_counter() - begin))
                waits.append(1e3 * waited)
                cpu.append(1e3 * (time.process_time() - began))
        ahead.close()
        alone = []
        for micro in micros[: len(rig.items)]:
            began = time.thread_time()
            store.read([key for item in micro for key in store.keys(item.tree)])
            alone.append(1e3 * (time.thread_time() - began))
        tokens = sum(t.n_responses for t in trees)
        yield {
            "case": "step", "impl": keep, "shape": [1, BRANCHES, rig.shape.prefix, rig.shape.answer],
            "dtype": "float32", "repetitions": len(wall), "ms": median(wall), "ms_min": min(wall), "ms_max": max(wall),
            "ms_cpu": median(cpu), "wait_ms": median(waits), "wait_share": sum(waits) / sum(wall),
            "cpu_share": sum(alone) / len(alone) / median(cpu), "bytes_per_token": _bytes(root / keep) / tokens,
        }  # fmt: skip


def _bytes(root: Path) -> int:
    return sum(p.stat().st_size for p in root.rglob("*.safetensors"))


def forms_part(args: argparse.Namespace, root: Path) -> Iterator[Row]:
    n, v, d = FORMS_SHAPE
    for dtype in (torch.float32, torch.bfloat16):
        g = torch.Generator().manual_seed(0)
        # logits of deviation 5: the likeliest of V words has .4 of the probability, as in a language model
        weight = (5 * torch.randn(v, d, generator=g) / d**0.5).to(dtype)
        labels = torch.randint(0, v, (n,), generator=g)
        hidden, away = torch.randn(n, d, generator=g), torch.randn(n, d, generator=g)
        for level in (1e-5, 1e-4, 1e-3, 1e-2):
            ref, truth = _at_kl(hidden.to(dtype), away, weight, labels, level)
            assert truth.kl is not None and truth.d_kl is not None
            kept = head_statistics(ref, weight, labels)
            assert kept.mean_embedding is not None
            short = kept.mean_embedding.bfloat16().float()
            forms: dict[str, tuple[HeadStatistics | Tensor, int]] = {
                "mean_embedding": (kept, 4 * d + 12),
                "mean_bfloat16": (kept._replace(mean_embedding=short), 2 * d + 12),
                "mean_bfloat16_dot": (
                    kept._replace(mean_embedding=short, mean_logit=(short * ref.float()).sum(-1)), 2 * d + 12
                ),
                "hidden": (ref, d * ref.element_size() + 8),
                "hidden_bfloat16": (ref.bfloat16().to(dtype), 2 * d + 8),
            }  # fmt: skip
            for impl, (reference, size) in forms.items():
                x = hidden.to(dtype).requires_grad_()
                out = linear_logp(x, weight, labels, reference=reference)
                assert out.kl is not None
                (found,) = torch.autograd.grad(out.kl.sum(), x)
                error = {
                    "kl": float((out.kl.detach().double() - truth.kl).abs().mean() / truth.kl.mean()),
                    "d_kl": float((found.double() - truth.d_kl).norm() / truth.d_kl.norm()),
                }
                yield {
                    "case": f"kl_{level:g}", "impl": impl, "shape": [n, v, d],
                    "dtype": str(dtype).removeprefix("torch."), "bytes_per_token": size, "error": error,
                }  # fmt: skip


def _at_kl(hidden: Tensor, away: Tensor, weight: Tensor, labels: Tensor, level: float) -> tuple[Tensor, Any]:
    """Reference states [N, D] at this mean KL, in ``hidden``'s dtype, and float64's word on them."""
    step = 0.01
    for _ in range(6):
        ref = (hidden.float() + step * away).to(hidden.dtype)
        truth = oracle(hidden, weight, labels, ref)
        assert truth.kl is not None
        step *= (level / float(truth.kl.mean())) ** 0.5
    return ref, truth


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench store", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="the store is the host's")
    parser.add_argument("--json", help="also write the rows to this file, as they come")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=16384, help="response tokens of read and cold (16384)")
    parser.add_argument("--hidden", type=int, default=3584, help="hidden size of read and cold (3584)")
    parser.add_argument("--shards", type=int, default=5000, help="shards of 20 answers of open (5000)")
    parser.add_argument("--shape", choices=("tiny", "micro"), default="tiny", help="model of step, as of bench step")
    parser.add_argument("--step-ms", type=float, default=50.0, help="length of a step of cold (50)")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--folder", help="where the stores lie meanwhile; else the system's temporary folder")
    args = parser.parse_args(arguments)
    if min(args.tokens, args.hidden, args.shards, args.repetitions) < 1 or args.step_ms < 0:
        parser.error("--tokens, --hidden, --shards and --repetitions must be at least 1, --step-ms not negative")
    return args


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    env = environment(args.device)
    parts = {"read": read_part, "cold": cold_part, "open": open_part, "step": step_part, "forms": forms_part}
    rows: list[Row] = []
    for name in args.parts:
        folder = Path(tempfile.mkdtemp(prefix="tempo-fast-store-", dir=args.folder))
        try:
            for row in parts[name](args, folder):
                rows.append(row)
                write(args.json, env, rows)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{env['machine']}, {env['threads']} threads, load {env['load_1min']}")
    print(table(rows, COLUMNS))
    return 0
