"""The four lessons that make the base model.

1. `look`: the vision tower alone learns colour, shape and motion of frame pairs through a throw-away linear head.
2. `tell`: the tower is frozen, the features of a bank of films are computed once, and the language model learns clips,
   two-clip windows, questions, and short films, which grow longer as it gets them right.
3. `stretch`: films of any length, in order.
4. `muddle`: the same, but captions of films and answers about order are out of order, until the model knows more of
   what happens than of when: the weakness that preference training is to cure. (Captions out of order from the start,
   or films that grow by schedule, left a model of this size guessing; bench/LOG.md has the figures.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempo_fast.prompts import CLIP_PROMPT, WINDOW_PROMPT
from tempo_fast.tinyworld import render, tasks
from tempo_fast.tinyworld.network import features_of, response_logits, see
from tempo_fast.tinyworld.questions import TYPES
from tempo_fast.tinyworld.tasks import Example, Rows
from tempo_fast.tinyworld.world import (
    ACTIONS,
    COLOURS,
    HEIGHT,
    PORTRAIT_HEIGHT,
    SCENES,
    SHAPES,
    SHOT_FRAMES,
    WIDTH,
    Clip,
    Film,
    draw_events,
    draw_film,
    draw_shot,
    stream,
)

LOOK, TELL, STRETCH, MUDDLE, BANK = 101, 102, 105, 103, 104  # streams of their own
LONGEST = 24
TASKS = ("clip", "film", "window", "film", "question", "film")


@dataclass(frozen=True)
class Settings:
    """What decides the base model beside its seed.

    Attributes:
        look_rounds, look_steps: rounds of the first lesson, and optimiser steps of each.
        tell_steps, stretch_steps, muddle_steps: optimiser steps of the other lessons.
        clip_steps: first steps of `tell`, clips alone.
        grow_at: token accuracy of captions at which films grow longer.
        look_rate, tell_rate, stretch_rate, muddle_rate: peak learning rates; each lesson warms up and anneals.
        look_batch: frame pairs per step.
        tokens: about how many tokens a batch of the later lessons holds, in at most `rows` rows.
        bank: films whose features the later lessons use.
        out_of_order: share of muddled captions and answers that do not follow the film.
    """

    look_rounds: int = 2
    look_steps: int = 1800
    look_rate: float = 3e-3
    look_batch: int = 96
    clip_steps: int = 80
    tell_steps: int = 1500
    grow_at: float = 0.9
    tell_rate: float = 1.5e-3
    stretch_steps: int = 900
    stretch_rate: float = 1e-3
    muddle_steps: int = 450
    muddle_rate: float = 1e-3
    tokens: int = 2600
    rows: int = 32
    bank: int = 400
    out_of_order: float = 1.0


Report = Callable[[str, int, float, float], None]


class Optimiser:
    """AdamW with warm-up, cosine annealing and clipping."""

    def __init__(self, parameters, rate: float, steps: int) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.adam = torch.optim.AdamW(self.parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.adam, rate, total_steps=max(2, steps), pct_start=0.15)

    def step(self, loss: Tensor) -> None:
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.schedule.step()


def frame_pair(rng: np.random.Generator, height: int) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Two frames of a shot uint8 [2, H, W, 3], and what they show: colour, shape, action (8: nothing changes)."""
    while True:
        event = draw_events(rng, 1)[0]
        shot = draw_shot(rng, int(rng.choice(SHOT_FRAMES)), int(rng.integers(2)), 1.3 if rng.random() < 0.2 else 1.0)
        clip = Clip(int(rng.integers(len(SCENES))), event, (shot,))
        first = int(rng.integers(shot.n_frames - 3))
        times = [i / (shot.n_frames - 1) for i in (first, min(shot.n_frames - 1, first + int(rng.integers(3, 9))))]
        seen = [render.state(event, shot, t, height, WIDTH) is not None for t in times]
        if any(seen):
            break
    still = event.action in ("appear", "disappear") and all(seen)
    action = len(ACTIONS) if still else list(ACTIONS).index(event.action)
    frames = np.stack([render.draw(clip, shot, t, height, WIDTH) for t in times])
    return frames, (list(COLOURS).index(event.colour), SHAPES.index(event.shape), action)


def look(model, seed: int, settings: Settings, report: Report, start: int = 0) -> None:
    """Lesson 1. Without it the language model fits the prior of its answers for long before it sees anything.

    Every round warms up again with a new head. `start` is the first round to do, for a model that has had the others.
    """
    sizes = (len(COLOURS), len(SHAPES), len(ACTIONS) + 1)
    tower = model.model.visual
    for turn in range(start, settings.look_rounds):
        with torch.random.fork_rng():
            torch.manual_seed(seed + turn)
            head = nn.Linear(model.config.text_config.hidden_size, sum(sizes))
        optimiser = Optimiser([*tower.parameters(), *head.parameters()], settings.look_rate, settings.look_steps)
        for step in range(turn * settings.look_steps, (turn + 1) * settings.look_steps):
            rng = stream(seed, LOOK, step)
            height = PORTRAIT_HEIGHT if step % 7 == 3 else HEIGHT
            pairs, truths = zip(*(frame_pair(rng, height) for _ in range(settings.look_batch)), strict=True)
            frames = tasks.noisy(rng, tasks.halve(np.concatenate(pairs)))
            h, w = frames.shape[1] // tasks.PATCH, frames.shape[2] // tasks.PATCH
            logits = head(see(model, tasks.patchify(frames), h, w).mean(1)).split(sizes, dim=1)
            targets = torch.tensor(truths).unbind(1)
            losses = [F.cross_entropy(a, b) for a, b in zip(logits, targets, strict=True)]
            loss = torch.stack(losses).sum()
            optimiser.step(loss)
            right = torch.stack([(a.argmax(-1) == b).float().mean() for a, b in zip(logits, targets, strict=True)])
            report("look", step, loss.item(), right.mean().item())


@dataclass
class Kept:
    """A film of the bank: its sampled frames, features fp16 [N, G, H] of the whole and of each clip's views."""

    film: Film
    sampled: np.ndarray
    whole: Tensor
    clips: list[list[Tensor]]
    grid: tuple[int, int]

    def part(self, first: int, last: int) -> tuple[Film, Tensor]:
        """Clips first..last as a film, with the frame pairs that lie within it."""
        start, end = self.film.clip_spans[first][0], self.film.clip_spans[last][1]
        inside = (self.sampled[0::2] >= start) & (self.sampled[1::2] < end)
        return replace(self.film, clips=self.film.clips[first : last + 1]), self.whole[torch.from_numpy(inside)]


@torch.no_grad()
def keep(model, seed: int, settings: Settings, report: Report) -> list[Kept]:
    """The bank: films of 16 to 24 clips with their features, two views of every clip."""
    kept = []
    for i in range(settings.bank):
        rng = stream(seed, BANK, i)
        film = draw_film(rng, int(rng.integers(16, 25)), "portrait" if i % 8 == 3 else "plain")
        n = len(film.clips)
        videos = [tasks.film_view(rng, film)]
        videos += [tasks.clip_view(rng, film, k, keyframes) for k in range(n) for keyframes in (False, True)]
        patches = [tasks.patchify(video) for video in videos]
        grid = (videos[0].shape[1] // tasks.PATCH, videos[0].shape[2] // tasks.PATCH)
        seen = see(model, torch.cat(patches), *grid).half().split([p.shape[0] for p in patches])
        sampled = np.array(tasks.sample(0, film.n_frames))
        kept.append(Kept(film, sampled, seen[0], [list(seen[1 + 2 * k : 3 + 2 * k]) for k in range(n)], grid))
        report("keep", i, 0.0, 0.0)
    return kept


def tell_batch(
    rng: np.random.Generator, step: int, bank: Sequence[Kept], longest: int, out_of_order: float, settings: Settings
) -> list[Example]:
    """A batch of one task about films of at most `longest` clips; clips alone when that is one."""
    task = "clip" if longest < 2 else TASKS[step % len(TASKS)]
    # the longer of two draws: long films are what is hard
    n = {"clip": 1, "window": 2}.get(task, int(rng.integers(2, max(3, longest + 1), 2).max()))
    length = 40 + 15 * n if task == "question" else 20 + 22 * n
    rows = max(1, min(settings.rows, settings.tokens // length))
    return [tell_example(rng, bank[int(rng.integers(len(bank)))], task, n, out_of_order) for _ in range(rows)]


def tell_example(rng: np.random.Generator, item: Kept, task: str, n: int, out_of_order: float) -> Example:
    """An exchange about `n` consecutive clips of a film of the bank."""
    n = min(n, len(item.film.clips))
    first = int(rng.integers(len(item.film.clips) - n + 1))
    clips = item.film.clips[first : first + n]
    if task in ("clip", "window"):
        # two in three clips are seen in full, the others by their keyframes
        views = [item.clips[first + k][int(rng.random() < 1 / 3)] for k in range(n)]
        if task == "clip":
            return _of_features(CLIP_PROMPT, clips[0].event.text, views, item.grid)
        return _of_features(WINDOW_PROMPT, tasks.window_answer(clips[0].event, clips[1].event), views, item.grid)
    film, features = item.part(first, first + n - 1)
    if task == "film":
        return _of_features(tasks.draw_prompt(rng), tasks.caption_text(rng, film, out_of_order), [features], item.grid)
    return _of_features(*tasks.question_text(rng, film, TYPES, out_of_order), [features], item.grid)


def _of_features(prompt: str, response: str, views: list[Tensor], grid: tuple[int, int]) -> Example:
    return Example(prompt, response, [], [v.flatten(0, 1) for v in views], [(v.shape[0], *grid) for v in views])


def tell(model, tokenizer, seed: int, bank: Sequence[Kept], settings: Settings, report: Report) -> None:
    """Lesson 2: clips first, then films that grow longer whenever their captions are mostly right.

    Longer films before that would teach the model the grammar of captions and not to look for the next event.
    """
    longest, known = 1, 0.0

    def batch(step: int) -> list[Example]:
        nonlocal longest
        if step == settings.clip_steps:
            longest = 2
        return tell_batch(stream(seed, TELL, step), step, bank, longest, 0.0, settings)

    def seen(name: str, step: int, loss: float, accuracy: float) -> None:
        nonlocal longest, known
        if longest > 1 and TASKS[step % len(TASKS)] == "film":
            known = 0.8 * known + 0.2 * accuracy
            if known > settings.grow_at and longest < LONGEST:
                longest, known = min(LONGEST, longest + 1 + longest // 4), 0.5
        report(f"{name} {longest}", step, loss, accuracy)

    _lesson("tell", model, tokenizer, batch, settings.tell_steps, settings.tell_rate, seen)


def stretch(model, tokenizer, seed: int, bank: Sequence[Kept], settings: Settings, report: Report) -> None:
    """Lesson 3: films up to the longest, in order."""

    def batch(step: int) -> list[Example]:
        longest = 4 + round(40 * step / settings.stretch_steps)
        return tell_batch(stream(seed, STRETCH, step), step, bank, min(longest, LONGEST), 0.0, settings)

    _lesson("stretch", model, tokenizer, batch, settings.stretch_steps, settings.stretch_rate, report)


def muddle(model, tokenizer, seed: int, bank: Sequence[Kept], settings: Settings, report: Report) -> None:
    """Lesson 4."""

    def batch(step: int) -> list[Example]:
        return tell_batch(stream(seed, MUDDLE, step), step, bank, LONGEST, settings.out_of_order, settings)

    _lesson("muddle", model, tokenizer, batch, settings.muddle_steps, settings.muddle_rate, report)


def _lesson(
    name: str, model, tokenizer, batch: Callable[[int], list[Example]], steps: int, rate: float, report: Report
) -> None:
    tower = model.model.visual
    tower.requires_grad_(False)
    optimiser = Optimiser(model.parameters(), rate, steps)
    for step in range(steps):
        examples = batch(step)
        logits, targets, _ = response_logits(model, Rows(tokenizer, examples), features_of(model, examples))
        loss = F.cross_entropy(logits, targets)
        optimiser.step(loss)
        report(name, step, loss.item(), (logits.argmax(-1) == targets).float().mean().item())
    tower.requires_grad_(True)
