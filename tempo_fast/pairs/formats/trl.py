"""TRL's preference rows (TRL 1.16; docs/source/dataset_formats.md and trl/data_utils.py of huggingface/trl).

Written: the conversational form with an explicit prompt. The video stands in the prompt as
``{"type": "video", "video": path}``, which transformers' chat templates load, and again in a column ``videos``; TRL
itself has columns for images only and ignores that one.

Read: that; the implicit form, in which ``chosen`` and ``rejected`` are whole conversations that share their beginning;
plain strings with an explicit prompt; the video in the prompt or in ``videos`` or ``video``.
"""

from __future__ import annotations

from tempo_fast.pairs.formats.rows import ForeignRow, Layout, Pair, Row, RowError, Turn, answer_text, text_of, turns_of
from tempo_fast.schema import PreferenceRecord, Rejected


def _write(record: PreferenceRecord, rejected: Rejected, extra: Row) -> Row:
    content: list[Row] = [{"type": "video", "video": record.video}] if record.video else []
    content.append({"type": "text", "text": record.prompt})
    return {
        "prompt": [{"role": "user", "content": content}],
        "chosen": _answer(record.chosen),
        "rejected": _answer(rejected.text),
        "videos": [record.video] if record.video else [],
    }


def _answer(text: str) -> list[Row]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def _read(row: ForeignRow) -> Pair:
    before, chosen = _parts(row, "chosen")
    before_rejected, rejected = _parts(row, "rejected")
    if [(t.role, t.tagged) for t in before] != [(t.role, t.tagged) for t in before_rejected]:
        raise RowError("rejected", "begins with other messages than 'chosen'")
    given = row.row.get("prompt")
    if isinstance(given, list):
        if before:
            raise RowError("chosen", "must hold one message of the assistant where 'prompt' holds messages")
        turn = row.only_turn(turns_of(given, "prompt"), "prompt")
    elif before:
        turn = row.only_turn(before, "chosen")
        if given is not None and given != turn.text:
            raise RowError("chosen", "begins with another prompt than 'prompt'")
    else:
        text = text_of(row.row, "prompt")
        turn = Turn("user", text, text, [])
    video = row.video("videos", "video", inline=turn.videos)
    text = turn.text if row.own is not None else row.prompt("prompt", turn.tagged, video)
    return Pair(video, text, chosen, rejected)


def _parts(row: ForeignRow, name: str) -> tuple[list[Turn], str]:
    """(messages before the answer, the answer)."""
    value = row.row.get(name)
    if not isinstance(value, list) or len(value) < 2:
        return [], answer_text(value, name)
    return turns_of(value[:-1], name), answer_text(value[-1:], name)


def _claims(row: Row) -> bool:
    chosen = row.get("chosen")
    if isinstance(row.get("prompt"), list) or isinstance(chosen, list):
        return "rejected" in row or "chosen" in row
    return isinstance(chosen, str) and isinstance(row.get("rejected"), str) and "video" not in row


_PARTS = [{"role": str, "content": [{"type": str, "text": str}]}]
TRL = Layout(
    name="trl",
    columns=frozenset({"prompt", "chosen", "rejected", "videos", "video"}),
    id_column="",
    claims=_claims,
    write=_write,
    read=_read,
    tags=(),
    schema={
        "prompt": [{"role": str, "content": [{"type": str, "text": str, "video": str}]}],
        "chosen": _PARTS,
        "rejected": _PARTS,
        "videos": [str],
    },
)
