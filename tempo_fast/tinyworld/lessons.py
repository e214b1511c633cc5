"""The lessons that make the base model: looking, then clips and windows and short films, then long films.

1. `look`: the vision tower alone learns colour, shape and motion of frame pairs through a throw-away linear head.
2. `ground`: tower and language model together learn clips, two-clip windows, short films and questions.
3. `watch`: the tower is frozen, features of a bank of long films are computed once, and the language model learns
   their captions, most of them out of order; clips and windows stay in the mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

LOOK, GROUND, WATCH, BANK = 101, 102, 103, 104  # streams of their own


@dataclass(frozen=True)
class Settings:
    """What decides the base model beside its seed.

    Attributes:
        look_steps, ground_steps, watch_steps: optimiser steps of the three lessons.
        bank: long films whose features are kept for the last lesson.
        out_of_order: share of film captions, and of answers to questions of order, that do not follow the film.
        out_of_order_long: the same for films of more than eight clips.
        look_rate, ground_rate, watch_rate: peak learning rates; each lesson warms up and anneals to zero.
    """

    look_steps: int = 1800
    ground_steps: int = 480
    watch_steps: int = 500
    bank: int = 400
    out_of_order: float = 0.7
    out_of_order_long: float = 0.95
    look_rate: float = 3e-3
    ground_rate: float = 1.5e-3
    watch_rate: float = 1e-3
    look_batch: int = 96
    ground_batch: int = 32
    watch_batch: int = 8


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


def look(model, seed: int, settings: Settings, report: Report) -> None:
    """Lesson 1. Without it the language model fits the prior of its answers for long before it sees anything."""
    sizes = (len(COLOURS), len(SHAPES), len(ACTIONS) + 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(model.config.text_config.hidden_size, sum(sizes))
    tower = model.model.visual
    optimiser = Optimiser([*tower.parameters(), *head.parameters()], settings.look_rate, settings.look_steps)
    for step in range(settings.look_steps):
        rng = stream(seed, LOOK, step)
        height = PORTRAIT_HEIGHT if step % 7 == 3 else HEIGHT
        pairs, truths = zip(*(frame_pair(rng, height) for _ in range(settings.look_batch)), strict=True)
        frames = tasks.noisy(rng, tasks.halve(np.concatenate(pairs)))
        h, w = frames.shape[2] // tasks.PATCH, frames.shape[3] // tasks.PATCH
        logits = head(see(model, tasks.patchify(frames), h, w).mean(1)).split(sizes, dim=1)
        targets = torch.tensor(truths).unbind(1)
        loss = torch.stack([F.cross_entropy(a, b) for a, b in zip(logits, targets, strict=True)]).sum()
        optimiser.step(loss)
        right = torch.stack([(a.argmax(-1) == b).float().mean() for a, b in zip(logits, targets, strict=True)])
        report("look", step, loss.item(), right.mean().item())


def ground_batch(seed: int, step: int, settings: Settings) -> list[Example]:
    """A batch of one task and one frame size, so that little is padding."""
    rng = stream(seed, GROUND, step)
    variant = "portrait" if step % 7 == 3 else "plain"
    task = ("clip", "window", "film", "question")[step % 4] if step > settings.ground_steps // 8 else "clip"
    # films are four times as long as clips
    rows = settings.ground_batch // (2 if task in ("film", "question") else 1)
    return [short_example(rng, task, variant, settings) for _ in range(rows)]


def short_example(rng: np.random.Generator, task: str, variant: str, settings: Settings) -> Example:
    """An exchange about a clip, a window, or a film of two to four clips."""
    if task == "clip":
        return tasks.clip_example(rng, draw_film(rng, 1, variant))
    if task == "window":
        return tasks.window_example(rng, draw_film(rng, 2, variant))
    film = draw_film(rng, int(rng.integers(2, 5)), variant)
    return film_example(rng, film, [tasks.film_view(rng, film)], task, settings)


def film_example(rng: np.random.Generator, film: Film, views: list[Tensor], task: str, settings: Settings) -> Example:
    """A caption of the whole film, or a question about it."""
    out_of_order = settings.out_of_order if len(film.clips) <= 8 else settings.out_of_order_long
    if task == "film":
        return Example(tasks.draw_prompt(rng), tasks.caption_text(rng, film, out_of_order), views)
    return Example(*tasks.question_text(rng, film, TYPES, out_of_order), views)


def train_batch(model, tokenizer, optimiser: Optimiser, examples: list[Example]) -> tuple[float, float]:
    """One step on the mean token loss; returns (loss, token accuracy)."""
    logits, targets, _ = response_logits(model, Rows(tokenizer, examples), features_of(model, examples))
    loss = F.cross_entropy(logits, targets)
    optimiser.step(loss)
    return loss.item(), (logits.argmax(-1) == targets).float().mean().item()


def ground(model, tokenizer, seed: int, settings: Settings, report: Report) -> None:
    """Lesson 2."""
    optimiser = Optimiser(model.parameters(), settings.ground_rate, settings.ground_steps)
    for step in range(settings.ground_steps):
        report("ground", step, *train_batch(model, tokenizer, optimiser, ground_batch(seed, step, settings)))


@dataclass
class Kept:
    """A film of the bank with its features, fp16 [G, H]."""

    film: Film
    features: Tensor
    shape: tuple[int, int, int]


@torch.no_grad()
def keep(model, seed: int, settings: Settings, report: Report) -> list[Kept]:
    """Features of the bank's films: one in three short, the others 8 to 24 clips."""
    kept = []
    for i in range(settings.bank):
        rng = stream(seed, BANK, i)
        n_clips = int(rng.integers(3, 9)) if i % 3 == 2 else int(rng.integers(8, 25))
        film = draw_film(rng, n_clips, "portrait" if i % 8 == 3 else "plain")
        example = Example("", "", [tasks.film_view(rng, film)])
        kept.append(Kept(film, features_of(model, [example]).half(), example.shapes()[0]))
        report("keep", i, 0.0, 0.0)
    # neighbours in length share a batch
    return sorted(kept, key=lambda k: k.features.shape[0])


def watch_batches(seed: int, bank: list[Kept], settings: Settings) -> Iterator[list[Example]]:
    """Endless batches of captions and questions about the bank's films, with a clip or window batch in every fourth."""
    step = 0
    while True:
        rng = stream(seed, WATCH, step)
        if step % 4 == 3:
            task, variant = ("clip", "window")[step // 4 % 2], "portrait" if step % 7 == 3 else "plain"
            yield [short_example(rng, task, variant, settings) for _ in range(settings.ground_batch)]
        else:
            task = "question" if step % 4 == 2 else "film"
            start = int(rng.integers(max(1, len(bank) - settings.watch_batch + 1)))
            rows = []
            for item in bank[start : start + settings.watch_batch]:
                example = film_example(rng, item.film, [], task, settings)
                example.features, example.grids = [item.features], [item.shape]
                rows.append(example)
            yield rows
        step += 1


def watch(model, tokenizer, seed: int, settings: Settings, report: Report) -> None:
    """Lesson 3."""
    tower = model.model.visual
    tower.requires_grad_(False)
    bank = keep(model, seed, settings, report)
    optimiser = Optimiser(model.parameters(), settings.watch_rate, settings.watch_steps)
    batches = watch_batches(seed, bank, settings)
    for step in range(settings.watch_steps):
        report("watch", step, *train_batch(model, tokenizer, optimiser, next(batches)))
    tower.requires_grad_(True)
