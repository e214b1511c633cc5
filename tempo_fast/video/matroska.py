"""Matroska and WebM: whether the elements of a file fill it (RFC 8794, RFC 9559). Sizes and positions in bytes."""

from __future__ import annotations

from typing import BinaryIO, NamedTuple

_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
# timestamp, simple block, block group, sizes and positions, encrypted block, void, checksum
_IN_CLUSTER = {0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0x5854, 0xAF, 0xEC, 0xBF}


class _Element(NamedTuple):
    kind: int
    start: int
    size: int | None
    """None: not known, it lasts until its parent's next child."""


def _element(f: BinaryIO, at: int) -> _Element | None:
    f.seek(at)
    head = f.read(12)
    n = 9 - head[0].bit_length() if head else 9
    if n > 4 or len(head) <= n:
        return None
    m = 9 - head[n].bit_length()
    if m > 8 or len(head) < n + m:
        return None
    ones = (1 << 7 * m) - 1
    size = int.from_bytes(head[n : n + m], "big") & ones
    return _Element(int.from_bytes(head[:n], "big"), at + n + m, None if size == ones else size)


def segment_end(f: BinaryIO) -> int | None:
    """Where the segment says it ends; None where it says nothing, or the file is none of these."""
    segment = _segment(f)
    return None if segment is None or segment.size is None else segment.start + segment.size


def _segment(f: BinaryIO) -> _Element | None:
    head = _element(f, 0)
    if head is None or head.kind != _EBML or head.size is None:
        return None
    segment = _element(f, head.start + head.size)
    return segment if segment is not None and segment.kind == _SEGMENT else None


def gap(f: BinaryIO) -> int | None:
    """The first position where an element should be and none is, or that one ends beyond its parent; None for none.

    A reader finds its way again behind it, in silence, with frames lost. Clusters that state no size are not followed.
    """
    segment = _segment(f)
    if segment is None or segment.size is None:
        return None
    at, end = segment.start, segment.start + segment.size
    while at < end:
        child = _element(f, at)
        if child is None:
            return at
        if child.size is None:
            return None
        if child.start + child.size > end:
            return at
        inner, stop = child.start, child.start + child.size
        while child.kind == _CLUSTER and inner < stop:
            block = _element(f, inner)
            if block is None or block.kind not in _IN_CLUSTER or block.size is None or block.start + block.size > stop:
                return inner
            inner = block.start + block.size
        at = stop
    return None
