"""LLaMA-Factory's preference rows in the sharegpt form (0.9.6.dev0; data/README.md and
src/llamafactory/data/converter.py of hiyouga/LLaMA-Factory).

Written: ``conversations`` with ``from`` and ``value``, ``chosen`` and ``rejected`` as one message each, ``videos``; the
tag <video> first in the prompt, which must hold as many tags as there are videos. ``dataset_info`` is the entry that
LLaMA-Factory wants in its dataset_info.json.

Read: that; the same under OpenAI's names (``messages``, ``role``, ``content``); the alpaca form, whose prompt is
``instruction``, a line feed and ``input``. A ``system`` column is extra.
"""

from __future__ import annotations

from pathlib import Path

from tempo_fast.pairs.formats.rows import VIDEO_TAG, ForeignRow, Layout, Pair, Row, RowError, answer_text, turns_of
from tempo_fast.schema import PreferenceRecord, Rejected


def dataset_info(path: str | Path) -> Row:
    """The entry of ``dataset_info.json`` for a file of this format; its key is the file's stem."""
    path = Path(path)
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "videos": "videos"}
    return {path.stem: {"file_name": path.name, "formatting": "sharegpt", "ranking": True, "columns": columns}}


def _write(record: PreferenceRecord, rejected: Rejected, extra: Row) -> Row:
    return {
        "conversations": [{"from": "human", "value": (VIDEO_TAG if record.video else "") + record.prompt}],
        "chosen": {"from": "gpt", "value": record.chosen},
        "rejected": {"from": "gpt", "value": rejected.text},
        "videos": [record.video] if record.video else [],
    }


def _read(row: ForeignRow) -> Pair:
    if "instruction" in row.row:
        if row.row.get("history"):
            raise RowError("history", "holds earlier turns; one is supported")
        text = "\n".join([row.text("instruction"), *([row.text("input")] if row.row.get("input") else [])])
        video = row.video("videos")
        return Pair(video, row.prompt("instruction", text, video), row.text("chosen"), row.text("rejected"))
    field, keys = "conversations", ("from", "value")
    if field not in row.row and "messages" in row.row:
        field, keys = "messages", ("role", "content")
    turn = row.only_turn(turns_of(row.row.get(field), field, *keys), field)
    video = row.video("videos", inline=turn.videos)
    chosen, rejected = (answer_text(row.row.get(name), name, *keys) for name in ("chosen", "rejected"))
    return Pair(video, row.prompt(field, turn.tagged, video), chosen, rejected)


def _claims(row: Row) -> bool:
    if "instruction" in row:
        return "chosen" in row and "prompt" not in row
    return isinstance(row.get("chosen"), dict) and ("conversations" in row or "messages" in row)


_MESSAGE = {"from": str, "value": str}
LLAMA_FACTORY = Layout(
    name="llama-factory",
    columns=frozenset({"conversations", "messages", "instruction", "input", "history", "chosen", "rejected", "videos"}),
    id_column="",
    claims=_claims,
    write=_write,
    read=_read,
    tags=(VIDEO_TAG, "<image>", "<audio>"),
    schema={"conversations": [_MESSAGE], "chosen": _MESSAGE, "rejected": _MESSAGE, "videos": [str]},
)
