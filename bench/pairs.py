"""``python -m bench pairs``: preference pairs of videos whose events are known, held against what happens in them.

Films of tinyworld, every fourth with events that come again: a block of clips played twice (swapping its halves changes
nothing), or in other scenes the second time, one played back (reversing it changes nothing), or clips drawn from a few,
in their own scene or in others. They are curated and made into pairs by the commands' own steps and the shipped model,
for each of --modes: ``captions`` (perturb_on: captions), ``windows`` and ``video`` (perturb_on: frames, frames_answer).

- ``shots``: boundaries of shots found, against those drawn. ``f1`` over all videos; off by a frame is wrong.
- ``kept``: pairs kept. ``equal`` tell equal sentences in equal order and may not exist. ``same_shown`` were made from a
  perturbation that shows what the clean video shows, by the truth; they exist where the model captions equal clips
  differently.
- ``in_order``: share of chosen answers whose right events are told in the true order. ``told``: share of the true
  events that chosen answers tell.
- ``separated``: share of pairs that the judge tells apart, per r, over all kinds (95 % interval by resampling videos)
  and per kind (Wilson's). ``rules`` are other rules, to see what hangs on the choice: see RULES.
- ``more_often``: how much larger the share is at the largest r than at the smallest, over the kinds that a video has a
  pair of at both (95 % interval by resampling videos).
- ``noise``: two answers about the clean video, nothing perturbed: the share of those that the judge takes for two
  stories. In captions and windows the second is told from keyframes, in ``video`` under another instruction.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measure import environment, table, write
from tempo_fast.config import RunConfig
from tempo_fast.configio import load_config
from tempo_fast.errors import InputError
from tempo_fast.events import kendall_tau, matched_order
from tempo_fast.files import read_json, read_jsonl, write_jsonl
from tempo_fast.pairs.judge import Embed, events, measures, same_events
from tempo_fast.pipeline import run_steps
from tempo_fast.schema import Clips, PreferenceRecord, read_records
from tempo_fast.stats import Stat, bootstrap, share_interval
from tempo_fast.tinyworld import render
from tempo_fast.tinyworld.generate import truth_of
from tempo_fast.tinyworld.world import (
    MAX_RUNS,
    MIN_CUT,
    SCENES,
    Clip,
    Film,
    cut_strength,
    draw_film,
    film_of,
    stream,
)

Row = dict[str, Any]
MODES: dict[str, dict[str, str]] = {
    "captions": {"perturb_on": "captions"},
    "windows": {"perturb_on": "frames", "frames_answer": "windows"},
    "video": {"perturb_on": "frames", "frames_answer": "video"},
}
RULES: dict[str, Callable[[dict[str, float]], bool]] = {
    "coverage": lambda m: m["coverage"] < 0.5,
    "order_or_coverage": lambda m: m["coverage"] < 0.5 or m.get("order_agreement", 1.0) < 0.5,
    "rouge_l": lambda m: m["rouge_l"] < 0.5,
    "embedding": lambda m: m["embedding"] < 0.9,
}
"""What else could call a pair apart: missing or other events alone; these, or Kendall's tau; words in order; the mean
of the model's own input embeddings, which knows no order."""
COLUMNS = ("case", "r", "kind", "n", "videos", "value", "lo", "hi", "rules", "more")
AGAIN = 106  # a stream of films of its own
STYLES = ("twice", "moved", "back", "own", "other")


# -- films in which something comes again -----------------------------------------------------------------------------


def film_again(seed: int, index: int, style: str) -> Film:
    """A film of 8 to 15 clips with fewer events than clips.

    ``twice``: a block and the block again; ``moved``: the block again in other scenes; ``back``: a block and its mirror
    image; ``own``: clips drawn from four, each event in its own scene; ``other``: the same, but in any scene.
    """
    rng = stream(seed, AGAIN, index)
    for _ in range(10_000):
        if style in ("twice", "moved", "back"):
            block = draw_film(rng, int(rng.integers(4, 8)), two_shots=0.0).clips
            again = {"twice": block, "moved": [_elsewhere(rng, clip) for clip in block], "back": block[-2::-1]}[style]
            clips = (*block, *again)
        else:
            pool = draw_film(rng, 4, two_shots=0.0).clips
            drawn = [pool[int(i)] for i in rng.integers(len(pool), size=int(rng.integers(9, 13)))]
            clips = tuple(drawn) if style == "own" else tuple(_elsewhere(rng, clip) for clip in drawn)
        if _is_plain(clips):
            return Film(clips)
    raise AssertionError(f"no film of style {style}")


def _elsewhere(rng: np.random.Generator, clip: Clip) -> Clip:
    view = int(rng.integers(2))
    return Clip(int(rng.integers(len(SCENES))), clip.event, (replace(clip.shots[0], view=view),))


def _is_plain(clips: Sequence[Clip]) -> bool:
    """Whether every cut is strong and no scene comes more often than curation allows."""
    views = [2 * clip.scene + clip.shots[0].view for clip in clips]
    scenes = [clip.scene for clip in clips]
    strong = all(a // 2 != b // 2 and cut_strength()[a, b] >= MIN_CUT for a, b in zip(views, views[1:], strict=False))
    return strong and max(map(scenes.count, scenes)) <= min(MAX_RUNS, len(clips) // 3)


def make_world(out: Path, seed: int, videos: int, again: int = 4, longest: int = 0) -> dict[str, Row]:
    """Write ``videos`` films below ``out`` and return the truth by path. Every ``again``-th is of ``film_again``;
    ``longest`` > 0 leaves out films of more clips. Films that are there are left alone."""
    truths: dict[str, Row] = {}
    index = 0
    (out / "videos").mkdir(parents=True, exist_ok=True)
    while len(truths) < videos:
        n = len(truths)
        film = film_again(seed, n, STYLES[n // again % len(STYLES)]) if n % again == again - 1 else None
        while film is None:
            film, index = film_of(seed, "train", index), index + 1
            film = None if longest and len(film.clips) > longest else film
        path = out / "videos" / f"{n:04d}.mp4"
        if not path.is_file():
            render.encode(film, path, seed=n)
        pts = [0] * film.n_frames  # times are not looked at
        truths[str(path)] = truth_of(film, str(path), "train", pts)
    return truths


# -- pairs by the commands' steps -------------------------------------------------------------------------------------


@dataclass
class Made:
    """What the step ``pairs`` left: records of all r, and the audit."""

    records: list[PreferenceRecord]
    audit: Row

    @property
    def chosen(self) -> dict[str, str]:
        """The chosen answer of each video (one: instruction per_video)."""
        return {x.video: x.chosen for x in self.records}


def configure(out: Path, videos: Path, model: str, settings: dict[str, Any], adapter: str = "") -> RunConfig:
    """The recipe tinyworld on ``videos``, with other ``pairs`` settings, or another ``seed``."""
    config = load_config("tinyworld")
    config.output_dir, config.model.path, config.data.videos = str(out), model, f"{videos}/*.mp4"
    config.curate.workers, config.generation.adapter = 1, adapter
    for key, value in settings.items():
        setattr(config, key, value) if key == "seed" else setattr(config.pairs, key, value)
    config.train.stages = []  # of these r there may be no pairs
    config.validate()
    return config


def make(config: RunConfig, curated: Path) -> Made:
    """Run the step ``pairs`` on clips that another run curated."""
    out = Path(config.output_dir)
    (out / "curate").mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "curate" / "clips.jsonl", (row for _, row in read_jsonl(curated)))
    run_steps(config, ["pairs"])
    return load(config)


def load(config: RunConfig) -> Made:
    """The pairs that are there."""
    out = Path(config.output_dir)
    files = [out / "pairs" / f"r{r}.jsonl" for r in config.pairs.r]
    records = [x for file in files if file.is_file() for x in read_records(file, PreferenceRecord)]
    return Made(records, read_json(out / "pairs" / "audit.json"))


def retold(mode: str) -> dict[str, Any]:
    """Settings under which the clean videos are told once more in another way, and little else."""
    few = {"r": [16], "kinds": ["drop"]}
    return {**few, "seed": 1} if mode == "video" else {**few, "perturb_on": "captions", "clip_input": "keyframes"}


# -- against the truth ------------------------------------------------------------------------------------------------


def shot_row(clips: Sequence[Clips], truths: dict[str, Row]) -> Row:
    """Boundaries are the first frames of all shots but the first of each video."""
    found = {(c.video, start) for c in clips for start, _ in c.shots[1:]}
    true = {(c.video, start) for c in clips for start, _ in truths[c.video]["shots"][1:]}
    hits = len(found & true)
    f1 = 2 * hits / (len(found) + len(true)) if found or true else 1.0
    more = {"precision": hits / max(1, len(found)), "recall": hits / max(1, len(true)), "usable": len(clips)}
    return {"case": "shots", "n": len(true), "videos": len(truths), "value": f1, "more": more}


def true_events(clips: Clips, truth: Row) -> list[str]:
    """What happens in each curated clip: the event at its middle frame."""
    spans = [(e["start_frame"], e["end_frame"], e["text"]) for e in truth["events"]]
    middles = [(c.start_frame + c.end_frame) // 2 for c in clips.clips]
    return [next(text for start, end, text in spans if start <= m < end) for m in middles]


def kept_row(made: Made, clips: dict[str, Clips], truths: dict[str, Row]) -> Row:
    """Pairs that are no pairs, by their texts and by the truth."""
    equal = same_shown = total = 0
    for record in made.records:
        shown = true_events(clips[record.video], truths[record.video])
        for x in record.rejected:
            total += 1
            equal += same_events(record.chosen, x.text)
            same_shown += not any(x.blank) and [shown[i] for i in x.order] == shown
    filtered: dict[str, int] = defaultdict(int)
    for per in made.audit["stats"].values():
        for row in per.values():
            for reason, n in row["filtered"].items():
                filtered[reason] += n
    more = {"same_shown": same_shown, **dict(sorted(filtered.items()))}
    return {"case": "kept", "n": total, "equal": equal, "more": more, "value": equal / max(1, total)}


def told_rows(made: Made, truths: dict[str, Row]) -> list[Row]:
    """The order and the completeness of the chosen answers."""
    ordered, told, taus = 0, [], []
    chosen = made.chosen
    for video, text in chosen.items():
        true = [t for e in truths[video]["events"] for t in events(e["text"])]
        order = matched_order(events(text), true)
        ordered += order == sorted(order)
        told.append(len(order) / len(true))
        taus.append(kendall_tau(order))
    known = [t for t in taus if t is not None]
    rows = [
        {"case": "in_order", **share_interval(ordered, len(chosen)), "more": {"tau": sum(known) / max(1, len(known))}},
        {"case": "told", **bootstrap(told, [1] * len(told), 2000, 0)},
    ]
    return [{**row, "videos": len(chosen)} for row in rows]


# -- the judge --------------------------------------------------------------------------------------------------------


def separated_rows(made: Made, embed: Embed | None, kinds: Sequence[str], rs: Sequence[int]) -> list[Row]:
    """Per r: all kinds together, then each."""
    found: dict[tuple[int, str], dict[str, dict[str, float]]] = defaultdict(dict)
    for record in made.records:
        for x in record.rejected:
            found[record.r, x.kind][record.video] = measures(record.chosen, x.text, embed)
    rows = []
    for r in rs:
        pooled: dict[str, list[dict[str, float]]] = defaultdict(list)
        for kind in kinds:
            for video, m in found[r, kind].items():
                pooled[video].append(m)
        rows.append({"case": "separated", "r": r, "kind": "all", **_shares(list(pooled.values()))})
        for kind in kinds:
            each = [[m] for m in found[r, kind].values()]
            share = share_interval(sum(m["separated"] > 0 for (m,) in each), len(each))
            rows.append({"case": "separated", "r": r, "kind": kind, **_shares(each), **share})
    return rows


def more_often_row(made: Made, high: int, low: int) -> Row:
    """The judge's share at ``high`` less that at ``low``, of the same videos and kinds."""
    apart: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for record in made.records:
        for x in record.rejected:
            apart[record.video, x.kind][record.r] = measures(record.chosen, x.text)["separated"]
    by_video: dict[str, list[float]] = defaultdict(list)
    for (video, _), of in apart.items():
        if high in of and low in of:
            by_video[video].append(of[high] - of[low])
    s = bootstrap([sum(d) for d in by_video.values()], [len(d) for d in by_video.values()], 2000, 0)
    share = {k: s[k] for k in ("value", "lo", "hi")}
    return {"case": "more_often", "r": [high, low], "kind": "all", **share, "n": s["items"], "videos": s["n"]}


def noise_row(made: Made, again: Made, embed: Embed | None) -> Row:
    """The judge on two answers about the same clean video."""
    both = [v for v in made.chosen if v in again.chosen]
    found = [[measures(made.chosen[v], again.chosen[v], embed)] for v in both]
    return {"case": "noise", "r": None, "kind": "none", **_shares(found)}


def _shares(videos: Sequence[Sequence[dict[str, float]]]) -> Row:
    """The judge's share of pairs with its interval over videos, means of the measures, shares of other rules."""
    pairs = [m for video in videos for m in video]
    if not pairs:
        return {"n": 0, "videos": 0}
    share: Stat = bootstrap([sum(m["separated"] for m in v) for v in videos], [len(v) for v in videos], 2000, 0)
    means = {k: [m[k] for m in pairs if k in m] for k in dict.fromkeys(k for m in pairs for k in m)}
    rules = {}
    for name, rule in RULES.items():
        if name != "embedding" or "embedding" in pairs[0]:
            s = bootstrap([sum(map(rule, v)) for v in videos], [len(v) for v in videos], 2000, 0)
            rules[name] = [round(s[k], 3) for k in ("value", "lo", "hi")]
    return {
        **{k: share[k] for k in ("value", "lo", "hi")}, "n": len(pairs), "videos": len(videos), "rules": rules,
        "more": {k: sum(v) / len(v) for k, v in means.items() if k != "separated"},
    }  # fmt: skip


def mean_embedding(path: str) -> Embed:
    """The mean of a model's input embeddings over a text's tokens."""
    from tempo_fast.models.load import load_bundle, resolve_path

    bundle = load_bundle(str(resolve_path(path)), "float32", "cpu")
    table = bundle.model.get_input_embeddings().weight.detach()

    def embed(texts: Sequence[str]) -> list[list[float]]:
        ids = [bundle.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [table[torch.tensor(i)].double().mean(0).tolist() for i in ids]

    return embed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench pairs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--json", help="also write the rows to this file, as they come")
    parser.add_argument("--work", help="folder that keeps videos and answers; default: a temporary one")
    parser.add_argument("--videos", type=int, default=48)
    parser.add_argument("--again", type=int, default=4, help="every so-many-th film repeats events (default 4)")
    parser.add_argument("--longest", type=int, default=0, help="leave out films of more clips; 0 is no limit")
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--kinds", nargs="+", default=["drop", "shuffle", "reverse"])
    parser.add_argument("--r", nargs="+", type=int, default=[16, 8, 4, 2])
    parser.add_argument("--model", default="tinyworld", help="who captions (default: the shipped model)")
    parser.add_argument("--adapter", default="", help="a PEFT adapter on it, such as a stage's of training")
    parser.add_argument("--seed", type=int, default=20, help="of the films")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    env = {**environment(args.device), "model": args.model, "adapter": args.adapter}
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory() as temporary:
            measure(Path(args.work or temporary), args, env, rows)
    except InputError as e:
        print(f"bench pairs: {e}")
        return 2
    print(table(rows, ("mode", *COLUMNS)))
    return int(any(row.get("equal") for row in rows))


def measure(work: Path, args: argparse.Namespace, env: Row, rows: list[Row]) -> None:
    """Fill ``rows``."""

    def add(mode: str, *found: Row) -> None:
        rows.extend({"mode": mode, **row} for row in found)
        write(args.json, env, rows, columns=["mode", *COLUMNS])

    world = work / "world"
    truths = make_world(world, args.seed, args.videos, args.again, args.longest)
    run_steps(configure(work / "curated", world / "videos", args.model, {}), ["curate"])
    curated = work / "curated" / "curate" / "clips.jsonl"
    clips = {c.video: c for c in read_records(curated, Clips)}
    add("", shot_row(list(clips.values()), truths))
    embed = mean_embedding(args.model)
    for mode in args.modes:
        begin = time.perf_counter()
        base = {**MODES[mode], "r": args.r, "kinds": args.kinds}
        made, again = (
            make(configure(work / mode / name, world / "videos", args.model, {**base, **more}, args.adapter), curated)
            for name, more in (("pairs", {}), ("retold", retold(mode)))
        )
        add(mode, kept_row(made, clips, truths), *told_rows(made, truths))
        add(mode, *separated_rows(made, embed, args.kinds, args.r), noise_row(made, again, embed))
        if len(args.r) > 1:
            add(mode, more_often_row(made, max(args.r), min(args.r)))
        add(mode, {"case": "seconds", "value": time.perf_counter() - begin})
