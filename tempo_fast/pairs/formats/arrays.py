"""The rows of a JSON array, one at a time: a file of any size in the memory of its largest row."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

CHUNK = 1 << 18
_SPACE = re.compile(r"[ \t\r\n]*")
_NEXT = re.compile(r",[ \t\r\n]*(?=\{)")
# one of these stands in every row of every format, and in no object inside a row
_MARKS = {"chosen", "rejected", "rejected_response", "rejected_messages", "pred", "answer"}
_DECODER = json.JSONDecoder(parse_constant=lambda _: None)


def read_array(f: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Yield (text of an element, the element), or (reason, ValueError) for one that is broken.

    Bytes that are not UTF-8 come as surrogates in the text. After a broken element the next one that looks like a row
    is looked for; all between counts as one element.
    """
    text = _Text(f)
    text.at += 1
    if text.peek() == "]":
        text.at += 1
        yield from _rest(text)
        return
    while True:
        text.peek()
        try:
            element = text.element()
            after = text.peek()
            if after not in ("", ",", "]"):
                raise ValueError(f"expected ',' after it, found {after!r}")
            yield element
        except (ValueError, RecursionError) as e:
            yield f"not valid JSON ({e})", ValueError()
            if not text.resync():
                return
            continue
        text.at += 1
        if after == "]":
            yield from _rest(text)
            return
        if not after:
            yield "not valid JSON (the array has no end)", ValueError()
            return


def _rest(text: _Text) -> Iterator[tuple[str, Any]]:
    if text.peek():
        yield "not valid JSON (more after the end of the array)", ValueError()


class _Text:
    """A window on the file's text that grows when an element does not end in it."""

    def __init__(self, f: BinaryIO) -> None:
        self.f = f
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.buffer = ""
        self.at = 0
        self.ended = False
        self.peek()

    def more(self) -> bool:
        """Read as much again as is held. False at the end of the file."""
        self.buffer, self.at = self.buffer[self.at :], 0
        block = self.f.read(max(CHUNK, len(self.buffer)))
        self.ended = not block
        self.buffer += self.decoder.decode(block, final=self.ended)
        return not self.ended

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self.at = _SPACE.match(self.buffer, self.at).end()  # type: ignore[union-attr]  # matches anything
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more():
                return ""

    def element(self) -> tuple[str, Any]:
        """Read one value. Raises ValueError for a broken one and leaves the window at its beginning."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as e:
                # an error near the end of the window, or a string that is still open, may be a value cut by it
                cut = e.pos >= len(self.buffer) - 8 or e.msg.startswith("Unterminated string")
                if not (cut and self.more()):
                    raise ValueError(e.msg) from e
                continue
            if end == len(self.buffer) and not isinstance(value, (dict, list, str)) and self.more():
                continue  # a number may go on
            text = self.buffer[self.at : end]
            self.at = end
            return text, value

    def resync(self) -> bool:
        """Go to the next object after a comma that looks like a row. False when there is none."""
        while True:
            match = _NEXT.search(self.buffer, self.at)
            if match is None:
                self.at = max(self.at, len(self.buffer.rstrip(" \t\r\n")) - 1)
                if not self.more():
                    return False
                continue
            self.at = match.end()
            try:
                text, value = self.element()
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict) and _MARKS & value.keys():
                self.at -= len(text)
                return True
