"""How good the base model is: captions, event precision, order preferences and questions on films it never saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tempo_fast.prompts import VIDEO_PROMPTS
from tempo_fast.tinyworld import tasks
from tempo_fast.tinyworld.network import features_of, response_logits
from tempo_fast.tinyworld.questions import TYPES, draw_question
from tempo_fast.tinyworld.tasks import Example, Rows
from tempo_fast.tinyworld.world import Film, draw_film, stream

RATIOS = (16, 8, 4, 2)


@torch.no_grad()
def exact(model, tokenizer, examples: Sequence[Example], batch: int = 32) -> float:
    """Share of examples whose greedy answer would be the response word for word.

    Greedy decoding gives the response exactly when every token of it is the most likely one after the true prefix.
    """
    right = 0
    for i in range(0, len(examples), batch):
        part = examples[i : i + batch]
        logits, targets, row = response_logits(model, Rows(tokenizer, part), features_of(model, part))
        wrong = row[logits.argmax(-1) != targets].unique()
        right += len(part) - len(wrong)
    return right / len(examples)


@torch.no_grad()
def log_probs(model, tokenizer, prompt: str, video: Tensor, answers: Sequence[str]) -> Tensor:
    """Sum of token log-probabilities of each answer [n]."""
    example = Example(prompt, "", [video])
    features = [features_of(model, [example])]
    rows = [Example(prompt, a, [], features, example.shapes()) for a in answers]
    logits, targets, row = response_logits(model, Rows(tokenizer, rows), features_of(model, rows))
    token = F.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]
    return torch.zeros(len(rows)).index_add(0, row, token)


@torch.no_grad()
def greedy(model, tokenizer, prompt: str, video: Tensor, max_tokens: int = 240) -> str:
    """The model's own answer about one video."""
    from transformers import DynamicCache

    rows = Rows(tokenizer, [Example(prompt, "", [video])])
    end = int((rows.targets[0] != -100).nonzero()[0]) + 1
    embed = model.get_input_embeddings()
    x = embed(rows.ids[:, :end])
    x = x.masked_scatter(rows.visual[:, :end, None], features_of(model, [Example(prompt, "", [video])]))
    positions, cache = rows.positions[:, :, :end], DynamicCache()
    out: list[int] = []
    while len(out) < max_tokens:
        hidden = model.model.language_model(
            inputs_embeds=x, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        token = int(model.lm_head(hidden[:, -1]).argmax())
        if token == tokenizer.eos_token_id:
            break
        out.append(token)
        positions = positions.amax().expand(3, 1, 1) + 1
        x = embed(torch.tensor([[token]]))
    return tokenizer.decode(out)


def split_events(text: str) -> list[str]:
    """The sentences of a caption."""
    return [f"{s.strip()}." for s in text.split(".") if s.strip()]


def caption_scores(said: Sequence[str], true: Sequence[str]) -> tuple[float, float, float | None]:
    """(precision, recall, Kendall tau of the events named right, None with fewer than two)."""
    named = list(dict.fromkeys(s for s in said if s in set(true)))
    precision = sum(s in set(true) for s in said) / max(1, len(said))
    places = [list(true).index(s) for s in named]
    pairs = [(a, b) for i, a in enumerate(places) for b in places[i + 1 :]]
    tau = sum(1 if a < b else -1 for a, b in pairs) / len(pairs) if pairs else None
    return precision, len(named) / len(true), tau


def perturb_texts(rng: np.random.Generator, texts: Sequence[str], kind: str, r: int) -> list[str]:
    """A perturbed order of n captions by the method's rule: drop keeps n//r; shuffle, reverse move groups of n//r."""
    n = len(texts)
    size = max(1, n // r)
    if kind == "drop":
        return [texts[int(i)] for i in sorted(rng.permutation(n)[:size])]
    groups = [list(texts[i : i + size]) for i in range(0, n, size)]
    if kind == "reverse":
        return [t for g in groups[::-1] for t in g]
    while True:
        order = rng.permutation(len(groups))
        if any(order != np.arange(len(groups))):
            return [t for i in order for t in groups[int(i)]]


def score_base(
    model, tokenizer, seed: int, *, n_clips: int = 200, n_films: int = 24, n_questions: int = 20
) -> dict[str, Any]:
    """All scores, on films drawn from a stream of their own."""
    model.eval()
    rng = stream(seed, 3)
    scores: dict[str, Any] = {}
    films = [draw_film(rng, 2, "portrait" if i % 8 == 0 else "plain") for i in range(n_clips)]
    scores["clip_exact"] = exact(model, tokenizer, [tasks.clip_example(rng, f) for f in films])
    two = [tasks.clip_example(rng, f, keyframes=True) for f in films]
    scores["keyframes_exact"] = exact(model, tokenizer, two)
    scores["window_exact"] = exact(model, tokenizer, [tasks.window_example(rng, f) for f in films])
    long = [draw_film(rng, int(rng.integers(16, 25))) for _ in range(n_films)]
    views = [tasks.film_view(rng, f) for f in long]
    captions = [greedy(model, tokenizer, VIDEO_PROMPTS[0], v) for v in views]
    parts = [
        caption_scores(split_events(c), [k.event.text for k in f.clips]) for c, f in zip(captions, long, strict=True)
    ]
    scores["caption_precision"] = float(np.mean([p for p, _, _ in parts]))
    scores["caption_recall"] = float(np.mean([r for _, r, _ in parts]))
    scores["caption_tau"] = float(np.mean([t for _, _, t in parts if t is not None] or [0.0]))
    scores["pairwise"] = pairwise(model, tokenizer, rng, long, views)
    scores["questions"] = question_scores(model, tokenizer, rng, long, views, n_questions)
    return scores


def pairwise(
    model, tokenizer, rng, films: Sequence[Film], views: Sequence[Tensor], prompt: str | None = None
) -> dict[str, float]:
    """Share of films whose true description beats its perturbed twin (per event for drop), per kind and r."""
    wins: dict[str, list[float]] = {}
    for film, view in zip(films, views, strict=True):
        texts = [clip.event.text for clip in film.clips]
        keys = [(kind, r) for kind in ("shuffle", "reverse", "drop") for r in RATIOS]
        twins = [perturb_texts(rng, texts, kind, r) for kind, r in keys]
        answers = [" ".join(texts), *(" ".join(t) for t in twins)]
        scores = log_probs(model, tokenizer, prompt or VIDEO_PROMPTS[0], view, answers)
        for (kind, r), twin, score in zip(keys, twins, scores[1:], strict=True):
            win = scores[0] / len(texts) > score / len(twin) if kind == "drop" else scores[0] > score
            wins.setdefault(f"{kind}_{r}", []).append(float(win))
    return {key: float(np.mean(value)) for key, value in wins.items()}


def question_scores(model, tokenizer, rng, films: Sequence[Film], views: Sequence[Tensor], n: int) -> dict[str, float]:
    """Multiple choice by likelihood, per type."""
    out = {}
    for kind in TYPES:
        right = []
        for i in range(n):
            question = draw_question(rng, films[i % len(films)], kind)
            if question is None:
                continue
            scores = log_probs(model, tokenizer, question.question, views[i % len(films)], question.options)
            right.append(float(int(scores.argmax()) == question.answer))
        out[kind] = float(np.mean(right)) if right else 0.0
    return out
