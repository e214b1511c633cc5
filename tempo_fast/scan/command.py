"""``tempo-fast scan``: which videos of a folder can be read, and what each costs in frames and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tempo_fast.config import VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.files import write_jsonl
from tempo_fast.models.family import CLIP_MEAN, CLIP_STD, VideoGeometry

QWEN2_VL = VideoGeometry(patch=14, merge=2, temporal=2, mean=CLIP_MEAN, std=CLIP_STD)


def scan_video(path: str | Path, reader: Any, *, decode: bool = True) -> dict[str, Any]:
    """One row: facts of the file, sampled frames and language-model tokens, ``ok``, and ``reason`` where it is not.

    ``decode`` also decodes the first, middle and last frame, which finds files whose end is missing.
    """
    row: dict[str, Any] = {"video": str(path), "ok": False, "reason": ""}
    try:
        info = reader.info(path)
        row |= {
            "codec": info.codec, "width": info.width, "height": info.height, "fps": round(info.fps, 3),
            "frames": info.n_frames, "duration_s": round(info.duration_s, 3), "rotation": info.rotation,
            "vfr": info.vfr, "has_audio": info.has_audio, "digest": info.digest,
        }  # fmt: skip
        plan = reader.plan(path)
        row |= {
            "sampled_frames": len(plan.indices), "resized": [plan.width, plan.height],
            "tokens": reader.geometry.tokens(plan.grid),
        }  # fmt: skip
        if decode:
            reader.frames(reader.plan(path, sorted({0, info.n_frames // 2, info.n_frames - 1})))
        row["ok"] = True
    except InputError as e:
        row["reason"] = str(e).removeprefix(f"{path}: ")
    return row


def scan_command(
    videos: str, *, recipe: str = "", overrides: Sequence[str] = (), out: Path | None = None, decode: bool = True
) -> None:
    """Print a table and a summary; with ``out`` also write JSON lines.

    Tokens are counted as the recipe's model counts them, as Qwen2-VL does where its directory is not there.
    """
    from tempo_fast.curate import list_videos
    from tempo_fast.runtime.progress import progress
    from tempo_fast.video.reader import VideoReader

    config, geometry, family = _settings(recipe, overrides)
    reader = VideoReader(config, geometry)
    paths = list_videos(videos)
    rows = [scan_video(path, reader, decode=decode) for path in progress(paths, "scan", "video")]
    if out is not None:
        write_jsonl(out, rows)
    print(table(rows))
    print(summary(rows, config, family) + (f"\n{out}: {len(rows)} rows" if out is not None else ""))


def _settings(recipe: str, overrides: Sequence[str]) -> tuple[VideoConfig, VideoGeometry, str]:
    """Configuration, geometry, and the family whose geometry it is."""
    if not recipe and not overrides:
        return VideoConfig(), QWEN2_VL, "qwen2_vl"
    from tempo_fast.configio import load_config
    from tempo_fast.models.load import load_family, resolve_path

    config = load_config(recipe or "temple", overrides)
    try:
        folder = resolve_path(config.model.path)
    except InputError:
        return config.video, QWEN2_VL, "qwen2_vl"
    family, hf_config = load_family(folder)
    return config.video, family.geometry(hf_config), family.name


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a video."""
    head = ("video", "codec", "size", "fps", "frames", "seconds", "sampled", "tokens", "")
    body = [head]
    for r in rows:
        if "codec" not in r:
            body.append((Path(r["video"]).name, "", "", "", "", "", "", "", r["reason"]))
            continue
        notes = [n for n, on in (("vfr", r["vfr"]), ("rotated", r["rotation"]), ("audio", r["has_audio"])) if on]
        body.append(
            (
                Path(r["video"]).name, r["codec"], f"{r['width']}x{r['height']}", f"{r['fps']:g}", str(r["frames"]),
                f"{r['duration_s']:.1f}", str(r.get("sampled_frames", "")), str(r.get("tokens", "")),
                r["reason"] or ", ".join(notes),
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in body) for i in range(len(head))]
    left = {0, 1, len(head) - 1}
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in body
    )


def summary(rows: Sequence[dict[str, Any]], config: VideoConfig, family: str) -> str:
    """Counts, hours, tokens, and the reasons of those that cannot be read."""
    good = [r for r in rows if r["ok"]]
    text = f"{len(good)} of {len(rows)} videos can be read"
    if good:
        hours = sum(r["duration_s"] for r in good) / 3600
        tokens = sorted(r["tokens"] for r in good)
        text += (
            f": {hours:.2f} h; tokens of {family} at {config.fps:g} fps and {config.max_pixels} pixels a frame: "
            f"median {tokens[len(tokens) // 2]}, most {tokens[-1]}, together {sum(tokens)}"
        )
    bad = [f"\n  {r['video']}: {r['reason']}" for r in rows if not r["ok"]]
    return text + "".join(bad)
