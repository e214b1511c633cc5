"""The instructions of this room; their texts live on the ground floor, as evaluation asks with them too."""

from tempo_fast.prompts import AGGREGATE_PROMPT, CLIP_PROMPT, VIDEO_PROMPTS, WINDOW_PROMPT, draw_prompt

__all__ = ["AGGREGATE_PROMPT", "CLIP_PROMPT", "VIDEO_PROMPTS", "WINDOW_PROMPT", "draw_prompt"]
