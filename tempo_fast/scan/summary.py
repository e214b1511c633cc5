"""A scan told in few lines: a table, and totals."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempo_fast.config import VideoConfig
from tempo_fast.scan.rows import Row

MOST_ROWS = 40
"""A table of more videos shows only those that want attention."""
_NAMED = 5
_MADE = {"remux": "remuxed", "reencode": "re-encoded"}


@dataclass
class Summary:
    """Totals over rows, added one at a time; a few numbers per row are kept.

    ``family`` names whose tokens are counted, ``max_tokens`` what a packed row may hold; ``unfixed`` are files that
    wanted a copy and got none.
    """

    config: VideoConfig
    family: str
    max_tokens: int
    videos: int = 0
    ok: int = 0
    seconds: float = 0.0
    size_bytes: int = 0
    frames_to_decode: int = 0
    decode_s: float = 0.0
    codecs: Counter[str] = field(default_factory=Counter)
    tokens: array[int] = field(default_factory=lambda: array("q"))
    reasons: dict[str, list[str]] = field(default_factory=dict)
    bad: Counter[str] = field(default_factory=Counter)
    fixes: Counter[str] = field(default_factory=Counter)
    unfixed: int = 0
    shown: list[Row] = field(default_factory=list)
    notable: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Count one row."""
        self.videos += 1
        self.size_bytes += row.get("size_bytes", 0)
        if "fix" in row:
            self.fixes[row["fix"]] += 1
            self.unfixed += bool(row["fix_reason"]) and not row["fixed"]
        if len(self.shown) <= MOST_ROWS:
            self.shown.append(row)
        if (not row["ok"] or row.get("fixed")) and len(self.notable) < MOST_ROWS:
            self.notable.append(row)
        if not row["ok"]:
            kind = reason_kind(row["reason"])
            self.bad[kind] += 1
            names = self.reasons.setdefault(kind, [])
            if len(names) < _NAMED:
                names.append(_printable(row["video"]))
            return
        self.ok += 1
        self.seconds += row["duration_s"]
        self.codecs[row["codec"]] += 1
        self.tokens.append(row["tokens"])
        self.frames_to_decode += row["frames_to_decode"]
        self.decode_s += row.get("decode_s", 0.0)

    def as_dict(self) -> dict[str, Any]:
        """For ``FILE.summary.json``. Hours and tokens are of the videos that can be read."""
        tokens = sorted(self.tokens)
        return {
            "videos": self.videos,
            "ok": self.ok,
            "hours": round(self.seconds / 3600, 4),
            "size_bytes": self.size_bytes,
            "codecs": dict(self.codecs.most_common()),
            "tokens": {
                "family": self.family, "fps": self.config.fps, "max_pixels": self.config.max_pixels,
                "median": percentile(tokens, 50), "p95": percentile(tokens, 95), "most": percentile(tokens, 100),
                "together": sum(tokens), "max_tokens": self.max_tokens,
                "over_max_tokens": sum(t > self.max_tokens for t in tokens),
            },
            "decode": {"frames_to_decode": self.frames_to_decode, "seconds": round(self.decode_s, 2)},
            "quarantine": [
                {"reason": kind, "videos": n, "first": self.reasons[kind]} for kind, n in self.bad.most_common()
            ],
            "fix": dict(self.fixes.most_common()),
            "unfixed": self.unfixed,
        }  # fmt: skip

    def text(self) -> str:
        """The same, to be read."""
        said = self.as_dict()
        tokens, decode = said["tokens"], said["decode"]
        lines = [f"{self.ok} of {self.videos} videos can be read"]
        if self.ok:
            size = f"{self.size_bytes / 1e9:.2f} GB" if self.size_bytes >= 1e9 else f"{self.size_bytes / 1e6:.1f} MB"
            lines[0] += f": {self.seconds / 3600:.2f} h, {size}"
            lines[0] += f" ({', '.join(f'{n} {codec}' for codec, n in said['codecs'].items())})"
            lines += [
                f"tokens of {self.family} at {self.config.fps:g} fps and {self.config.max_pixels} pixels a frame: "
                f"median {tokens['median']}, 95 % {tokens['p95']}, most {tokens['most']}, "
                f"together {tokens['together']}; {tokens['over_max_tokens']} over train.max_tokens ({self.max_tokens})",
                f"decoding the sampled frames once: {decode['frames_to_decode']} frames"
                + (f", about {decode['seconds']:.1f} s here" if self.decode_s else ""),
            ]
        if self.fixes:
            told = [f"{self.fixes[kind]} {made}" for kind, made in _MADE.items() if self.fixes[kind]]
            line = f"repairs: {', '.join(told) or 'none'}"
            lines.append(line + (f"; {self.unfixed} wanted a copy and got none" if self.unfixed else ""))
        for kind, n in self.bad.most_common():
            lines.append(f"{n} × {kind}")
            lines += [f"  {name}" for name in self.reasons[kind]]
            lines += [f"  and {n - _NAMED} more"] if n > _NAMED else []
        return "\n".join(lines)

    def table(self) -> str:
        """One line a video, or a line for each that wants attention when there are many."""
        if self.videos <= MOST_ROWS:
            return table(self.shown)
        return table(self.notable) if self.notable else ""


def percentile(ordered: Sequence[int], percent: int) -> int:
    """The smallest value that so many percent of the values do not exceed (nearest rank); 0 of none."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else 0


def reason_kind(reason: str) -> str:
    """A reason without what differs from file to file: numbers, and what stands in brackets."""
    return re.sub(r"\d+(\.\d+)?", "…", re.sub(r"\s*\([^()]*\)", "", reason))


def table(rows: Sequence[Row]) -> str:
    """One line a video."""
    head = ("video", "codec", "size", "fps", "frames", "seconds", "gop", "sampled", "tokens", "decode s", "")
    body: list[tuple[str, ...]] = [head]
    for r in rows:
        notes = [r["reason"]] if r["reason"] else []
        flags = {"vfr": "vfr", "rotated": "rotation", "edit list": "edit_list", "audio": "has_audio"}
        notes += [] if notes else [name for name, field in flags.items() if r[field]]
        notes += [f"fixed by {r['fix']}"] if r.get("fixed") else []
        if "codec" not in r:
            body.append((Path(r["video"]).name, *[""] * 9, ", ".join(notes)))
            continue
        body.append(
            (
                Path(r["video"]).name, r["codec"], f"{r['width']}x{r['height']}", f"{r['fps']:g}", str(r["frames"]),
                f"{r['duration_s']:.1f}", str(r["longest_gop"]), str(r.get("sampled_frames", "")),
                str(r.get("tokens", "")), f"{r['decode_s']:.2f}" if "decode_s" in r else "",
                ", ".join(notes),
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in body) for i in range(len(head))]
    left = {0, 1, len(head) - 1}
    text = "\n".join(
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in body
    )
    return _printable(text)


def _printable(text: str) -> str:
    """Names may hold bytes that are not UTF-8."""
    return text.encode(errors="replace").decode()
