"""The instructions given to a model: for clip captions, two-clip windows, whole videos and aggregation."""

from __future__ import annotations

from collections.abc import Sequence

from tempo_fast.files import digest

CLIP_PROMPT = "Describe what happens in this clip."

WINDOW_PROMPT = "Clip 1 comes before clip 2. Say what happens in clip 1, then describe clip 2 on the last line."

VIDEO_PROMPTS = [
    "Describe this video in order.",
    "Write a detailed caption for this video.",
    "Tell what happens in the video from start to end.",
    "List the events of this video as they occur.",
    "Give a full description of the video.",
    "What happens in this video, step by step?",
]

AGGREGATE_PROMPT = (
    "These are captions of the consecutive clips of one video, in chronological order:\n{captions}\n"
    "Write one paragraph that describes the entire video in this order. Do not mention clips or captions."
)


def draw_prompt(pool: Sequence[str], *key: object) -> str:
    """One of ``pool``; the draw depends on nothing but the key (seed, digest of a video, ...) and the pool's size."""
    return pool[int(digest(["prompt", *key])[:15], 16) % len(pool)]
