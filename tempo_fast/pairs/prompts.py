"""The instruction that a video is captioned by."""

from __future__ import annotations

import os
from collections import defaultdict

from tempo_fast.errors import InputError
from tempo_fast.files import read_jsonl
from tempo_fast.prompts import VIDEO_PROMPTS, draw_prompt


class PromptPool:
    """Instructions to caption a video: the built-in ones, or those of a JSONL file with fields video and prompt.

    Lines whose video is empty are for all videos; a video with lines of its own draws from those. A name matches the
    whole path, or the file name alone.

    Raises:
        InputError: a line without prompt, or a file without lines.
    """

    def __init__(self, path: str = "") -> None:
        self.common: list[str] = []
        self.own: dict[str, list[str]] = defaultdict(list)
        if not path:
            self.common = list(VIDEO_PROMPTS)
            return
        for number, row in read_jsonl(path):
            prompt, video = row.get("prompt"), row.get("video", "")
            if not isinstance(prompt, str) or not prompt.strip():
                raise InputError(f"{path}:{number}: field 'prompt' is missing or empty")
            if not isinstance(video, str):
                raise InputError(f"{path}:{number}: field 'video' must be str, got {type(video).__name__}")
            (self.own[os.path.normpath(video)] if video else self.common).append(prompt)
        if not self.common and not self.own:
            raise InputError(f"{path}: data.prompts holds no line")

    def draw(self, video: str, *key: object) -> str:
        """The instruction of a video for this key. Raises InputError when the file has none for it."""
        own = self.own.get(os.path.normpath(video)) or self.own.get(os.path.basename(video)) or self.common
        if not own:
            raise InputError(f"data.prompts: no prompt for {video}")
        return draw_prompt(own, *key)
