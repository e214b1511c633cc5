"""Damaged copies of counter clips, and the process that reads them; run as a program with a manifest.

A frame shows its number twice: six bits, and a permutation of them in six more, so that a picture that is in part an
older one shows no number at all.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from counter_clips import number_of, write_counter

N = 36
_GOP = 9
SOURCES: dict[str, dict[str, Any]] = {
    "h264.mp4": {"bframes": 2},
    "h264.mkv": {"bframes": 2},
    "h264.ts": {},
    "h264_fragments.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "h264_faststart.mp4": {"container": {"movflags": "faststart"}, "audio": True},
    "hevc.mp4": {"codec": "libx265", "bframes": 2},
    "hevc.mkv": {"codec": "libx265"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp9.mp4": {"codec": "libvpx-vp9"},
    "av1.mp4": {"codec": "libsvtav1"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    # large enough for frame threads
    "h264_threads.mp4": {"bframes": 3, "size": (576, 722)},
}


def code(number: int) -> int:
    return number | (number * 37 + 11) % 64 << 6


_NUMBER = {code(n): n for n in range(64)}


def shown(frame: Any) -> int | None:
    """The number a frame shows twice, or None."""
    word = number_of(frame)
    return None if word is None else _NUMBER.get(word)


def write_source(path: Path) -> Path:
    # ten columns beside the counter are texture, so that there is more to damage
    return write_counter(path, N, gop=_GOP, number=code, **{"size": (72, 202), **SOURCES[path.name]})


def packets(path: Path) -> list[tuple[int | None, bool, str]]:
    """(pts, keyframe, digest of the bytes) of each video packet, in coding order; empty when it cannot be read."""
    import av

    try:
        with av.open(str(path), metadata_errors="replace") as file:
            return [(p.pts, p.is_keyframe, hashlib.sha1(bytes(p)).hexdigest()) for p in file.demux(video=0) if p.size]
    except (av.error.FFmpegError, IndexError):
        return []


def told_packets(path: Path) -> dict[str, list[Any]]:
    """Of an undamaged file: packet digest -> [frame number, digest of the packet before it in coding order]."""
    found = packets(path)
    order = sorted(found)
    many = Counter(digest for _, _, digest in found)
    before = dict(zip([d for _, _, d in found], ["", *(d for _, _, d in found)], strict=False))
    return {d: [i, before[d]] for i, (_, _, d) in enumerate(order) if many[d] == 1}


def damages(whole: bytes, other: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """(kind, bytes) of damaged copies of a file; ``other`` is another file to take pieces from."""
    n = len(whole)

    def patched(at: int, piece: bytes) -> bytes:
        return whole[:at] + piece + whole[at + len(piece) :]

    def flipped(count: int, low: int = 0) -> bytes:
        data = bytearray(whole)
        for _ in range(count):
            data[rng.randrange(low, n)] ^= 1 << rng.randrange(8)
        return bytes(data)

    def piece(most: float) -> tuple[int, int]:
        length = rng.randrange(1, max(2, int(n * most)))
        return rng.randrange(n - length), length

    for _ in range(7):
        yield "truncated", whole[: rng.choice([rng.randrange(1, n), n - rng.randrange(1, 40), rng.randrange(1, 600)])]
    for count in (1, 1, 1, 1, 2, 8, 8, 64, 400):
        yield "flipped", flipped(count)
    for count in (1, 3, 20):
        yield "flipped late", flipped(count, n // 2)
    for _ in range(3):
        yield "flipped head", patched(0, _flip_within(whole[:400], rng))
    for most in (0.005, 0.02, 0.02, 0.2, 0.6):
        at, length = piece(most)
        yield "zeros", patched(at, bytes(length))
    for most in (0.01, 0.05, 0.3):
        at, length = piece(most)
        yield "noise", patched(at, rng.randbytes(length))
    for most in (0.01, 0.1, 0.4):
        at, length = piece(most)
        yield "cut out", whole[:at] + whole[at + length :]
    for most in (0.02, 0.3):
        at, length = piece(most)
        yield "twice", whole[: at + length] + whole[at:]
    cut = rng.randrange(n)
    yield "spliced", whole[:cut] + other[min(cut, len(other) - 1) :]
    yield "spliced", whole + other
    yield "spliced", patched(rng.randrange(n // 2), other[: n // 3])
    yield "header swapped", other[:64] + whole[64:]
    yield "header swapped", other[: n // 10] + whole[n // 10 :]


def _flip_within(head: bytes, rng: random.Random) -> bytes:
    data = bytearray(head)
    for _ in range(2):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def not_videos(whole: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """(file name, bytes) of files that are no videos, or do not say which."""
    yield "empty.mp4", b""
    yield "empty.webm", b""
    yield "one_byte.mp4", b"\0"
    yield "zeros.mp4", bytes(5000)
    yield "zeros.mkv", bytes(100_000)
    yield "text.mp4", b"not a film, only words\n" * 50
    yield "text.txt", b"not a film, only words\n" * 50
    yield "page.avi", b"<!DOCTYPE html><html><body>404 not found</body></html>"
    yield "table.webm", b'{"video": "x.mp4", "n": 3}\n' * 30
    yield "noise.ts", rng.randbytes(20_000)
    yield "noise.mp4", rng.randbytes(4_000)
    yield "picture.mp4", b"\x89PNG\r\n\x1a\n" + rng.randbytes(300)
    yield "sound.mp4", b"RIFF" + (36 + 800).to_bytes(4, "little") + b"WAVEfmt " + bytes(820)
    yield "archive.mp4", b"PK\x03\x04" + rng.randbytes(500)
    yield "head_only.mp4", whole[:32]
    yield "playlist.mp4", b"#EXTM3U\n#EXTINF:9,\nnowhere.ts\n"
    yield "renamed.webm", whole


def judge(path: Path, told: dict[str, list[Any]], decode: Callable[[list[int]], Any], info: Any) -> dict[str, Any]:
    """Decode every frame, and some again in another order; say what they show and what they should.

    By the container's own account frame k is the k-th packet in time, and where its bytes are those of a packet of the
    undamaged file it must show that packet's number. ``wrong``: it shows another, although the packet and all it builds
    on are whole. ``stale``: it shows another, behind a packet that is damaged or missing: an older picture, whole.
    ``unreadable``: a picture that is damaged. ``disordered``: where frames have no times, a number that runs backwards.
    ``moved``: a frame that shows another number when it is reached another way.
    """
    found = packets(path)
    wanted = list(range(min(info.n_frames, 3 * N)))
    seen = [shown(f) for f in decode(wanted)]
    report = {"n": info.n_frames, "right": 0, "wrong": [], "stale": [], "unreadable": 0, "unknown": 0, "disordered": []}
    report["unreadable"] = seen.count(None)

    trusted: dict[int, bool] = {}  # place in coding order -> whether all it builds on is whole
    good, last = False, ""
    for i, (_, key, digest) in enumerate(found):
        good = digest in told and (key or (good and told[digest][1] == last))
        trusted[i], last = good, digest
    order = sorted(trusted, key=lambda i: found[i][0]) if info.indexed and len(found) == info.n_frames else []
    for k, number in enumerate(seen):
        should = told.get(found[order[k]][2]) if order else None
        if number is None:
            continue
        if should is None:
            report["unknown"] += 1
        elif number == should[0]:
            report["right"] += 1
        else:
            report["wrong" if trusted[order[k]] else "stale"].append([k, should[0], number])
    if not order:
        readable = [n for n in seen if n is not None]
        report["disordered"] = [[a, b] for a, b in zip(readable, readable[1:], strict=False) if b <= a]

    rng = random.Random(path.name)
    some = [rng.choice(wanted) for _ in range(4)]
    again = zip(some, [shown(f) for f in decode(some)], strict=True)
    report["moved"] = [[k, seen[k], b] for k, b in again if None not in (b, seen[k]) and b != seen[k]]
    return report


def main(manifest: str) -> None:
    from tempo_fast.video.decode import DecodeError, open_decoder
    from tempo_fast.video.probe import probe

    task = json.loads(Path(manifest).read_text())
    decoder = open_decoder(task["backend"], timeout_s=task["timeout_s"])
    for name, source in task["files"]:
        row: dict[str, Any] = {"path": name}
        try:
            row |= judge(Path(name), task["told"].get(source, {}), partial(decoder.decode, name), probe(name))
        except DecodeError as e:
            row["error"] = str(e)
        with open("/proc/self/statm") as f:
            row["rss"] = int(f.read().split()[1]) * resource.getpagesize()
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
