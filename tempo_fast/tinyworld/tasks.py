"""What the base model is asked: clips, two-clip windows, whole videos and questions, as token batches.

Shape legend: B rows, T tokens of a padded row, N frame pairs, P patches of one frame pair, C*2*14*14 = 1176 values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tempo_fast.models.family import CLIP_MEAN, CLIP_STD, VideoGeometry
from tempo_fast.prompts import CLIP_PROMPT, VIDEO_PROMPTS, WINDOW_PROMPT
from tempo_fast.tinyworld import render
from tempo_fast.tinyworld.questions import ORDER_TYPES, draw_question
from tempo_fast.tinyworld.world import FPS, SAMPLE_FPS, Event, Film
from tempo_fast.video.preprocess import resize, to_patches
from tempo_fast.video.sampling import sample_frames

PATCH, MERGE = 14, 2
GEOMETRY = VideoGeometry(patch=PATCH, merge=MERGE, temporal=2, mean=CLIP_MEAN, std=CLIP_STD)
CLIP_MAX_FRAMES = 8


def sample(start: int, end: int, cap: int | None = None) -> list[int]:
    """Indices at 4 frames a second of [start, end): an even number, evenly spread, both ends included."""
    most = cap or max(2, end - start)
    found = sample_frames("qwen_vl_utils", end - start, FPS, fps=SAMPLE_FPS, min_frames=2, max_frames=most)
    return [start + i for i in found]


def halve(frames: np.ndarray) -> Tensor:
    """uint8 [F, H, W, 3] native -> uint8 [F, H/2, W/2, 3], the resize of the real path."""
    return resize(torch.from_numpy(frames), frames.shape[1] // 2, frames.shape[2] // 2)


def patchify(frames: Tensor) -> Tensor:
    """uint8 [F, H, W, 3] -> float [N, P, 1176], the patches of each frame pair; an odd last frame repeats."""
    return to_patches(frames, GEOMETRY).unflatten(0, (-(-frames.shape[0] // 2), -1))


@dataclass
class Example:
    """One exchange. `videos` are halved frames uint8 [F, H, W, 3]; `events` are the true events, for scoring."""

    prompt: str
    response: str
    videos: list[Tensor] = field(default_factory=list)
    features: list[Tensor] | None = None
    grids: list[tuple[int, int, int]] | None = None

    def shapes(self) -> list[tuple[int, int, int]]:
        """(frame pairs, patch rows, patch columns) of each video."""
        if self.grids is not None:
            return self.grids
        return [(-(-v.shape[0] // 2), v.shape[1] // PATCH, v.shape[2] // PATCH) for v in self.videos]


def clip_view(rng: np.random.Generator, film: Film, k: int, keyframes: bool = False) -> Tensor:
    """One clip as the method shows it: sampled frames, or two keyframes near 1/3 and 2/3; with a little noise."""
    start, end = film.clip_spans[k]
    n = end - start
    if keyframes:
        spots = np.clip(rng.normal((1 / 3, 2 / 3), 0.05), (0.18, 0.53), (0.47, 0.82))
        indices = [start + int(s * (n - 1) + 0.5) for s in spots]
    else:
        indices = sample(start, end, CLIP_MAX_FRAMES if rng.random() < 0.5 else None)
    return noisy(rng, halve(render.frames(film, indices)))


def film_view(rng: np.random.Generator, film: Film) -> Tensor:
    """The whole film at 4 frames a second, with a little noise."""
    return noisy(rng, halve(render.frames(film, sample(0, film.n_frames))))


# drawn once: fresh normals for every view would cost more than drawing it
_NOISE = torch.from_numpy(np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32))


def noisy(rng: np.random.Generator, frames: Tensor) -> Tensor:
    """Noise of about the size that H.264 leaves."""
    start = int(rng.integers(_NOISE.numel() - frames.numel()))
    noise = _NOISE[start : start + frames.numel()].view(frames.shape)
    return (frames + noise * float(rng.uniform(0, 4))).round_().clamp_(0, 255).to(torch.uint8)


def window_answer(first: Event, second: Event) -> str:
    """The answer to the two-clip prompt."""
    return f"In clip 1, {first.text[0].lower()}{first.text[1:]}\n{second.text}"


def clip_example(rng: np.random.Generator, film: Film, keyframes: bool = False) -> Example:
    """Caption one clip."""
    k = int(rng.integers(len(film.clips)))
    return Example(CLIP_PROMPT, film.clips[k].event.text, [clip_view(rng, film, k, keyframes)])


def window_example(rng: np.random.Generator, film: Film) -> Example:
    """Caption two consecutive clips."""
    k = int(rng.integers(len(film.clips) - 1))
    answer = window_answer(film.clips[k].event, film.clips[k + 1].event)
    return Example(WINDOW_PROMPT, answer, [clip_view(rng, film, k), clip_view(rng, film, k + 1)])


def caption_text(rng: np.random.Generator, film: Film, out_of_order: float) -> str:
    """The film's events; with probability `out_of_order` in a random order."""
    texts = [clip.event.text for clip in film.clips]
    if rng.random() < out_of_order:
        texts = [texts[int(i)] for i in rng.permutation(len(texts))]
    return " ".join(texts)


def draw_prompt(rng: np.random.Generator) -> str:
    """One of the six captioning instructions."""
    return VIDEO_PROMPTS[int(rng.integers(len(VIDEO_PROMPTS)))]


def question_text(rng: np.random.Generator, film: Film, kinds: Sequence[str], out_of_order: float) -> tuple[str, str]:
    """A question and its answer; with probability `out_of_order` the answer to a question of order is a guess."""
    while True:
        question = draw_question(rng, film, str(rng.choice(list(kinds))))
        if question is not None:
            break
    answer = question.answer
    if question.type in ORDER_TYPES and rng.random() < out_of_order:
        answer = int(rng.integers(len(question.options)))
    return question.question, question.options[answer]


class Rows:
    """A padded batch: ids [B, T], positions [3, B, T], visual [B, T] bool, targets [B, T] (-100 where none)."""

    def __init__(self, tokenizer, examples: Sequence[Example]) -> None:
        rows = [encode(tokenizer, e) for e in examples]
        longest = max(len(ids) for ids, _, _ in rows)
        pad = tokenizer.pad_token_id
        self.ids = torch.full((len(rows), longest), pad)
        self.positions = torch.zeros((3, len(rows), longest), dtype=torch.long)
        self.targets = torch.full((len(rows), longest), -100)
        for i, (ids, positions, n_prompt) in enumerate(rows):
            self.ids[i, : len(ids)] = torch.tensor(ids)
            self.positions[:, i, : len(ids)] = torch.from_numpy(positions)
            # targets are shifted: place t holds the token that t must predict
            self.targets[i, n_prompt - 1 : len(ids) - 1] = self.ids[i, n_prompt : len(ids)]
        self.visual = self.ids == tokenizer.convert_tokens_to_ids("<|video_pad|>")


_PROMPTS: dict[tuple[int, str, int], list[int]] = {}


def prompt_ids(tokenizer, prompt: str, n_videos: int) -> list[int]:
    """The chat prompt, one placeholder per video."""
    key = (id(tokenizer), prompt, n_videos)
    if key not in _PROMPTS:
        content = [{"type": "video"}] * n_videos + [{"type": "text", "text": prompt}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if len(_PROMPTS) > 4096:
            _PROMPTS.clear()
        _PROMPTS[key] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return _PROMPTS[key]


def encode(tokenizer, example: Example) -> tuple[list[int], np.ndarray, int]:
    """Token ids, M-RoPE positions [3, T] and the length of the prompt; text resumes after the largest position."""
    slot = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    shapes = iter(example.shapes())
    ids: list[int] = []
    axes: list[np.ndarray] = []
    start = 0
    for token in prompt_ids(tokenizer, example.prompt, len(example.shapes())):
        if token == slot:
            t, h, w = next(shapes)
            grid = np.indices((t, h // MERGE, w // MERGE)).reshape(3, -1) + start
            ids += [slot] * grid.shape[1]
            axes.append(grid)
            start = int(grid.max()) + 1
        else:
            ids.append(token)
            axes.append(np.full((3, 1), start))
            start += 1
    n_prompt = len(ids)
    answer = tokenizer(example.response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    axes.append(np.tile(np.arange(start, start + len(answer)), (3, 1)))
    return ids + answer, np.concatenate(axes, 1), n_prompt
