"""ms-swift's preference rows (4.6.0.dev0; docs/source_en/Customization/Custom-dataset.md and
swift/template/template_inputs.py of modelscope/ms-swift).

Written: ``messages`` with the chosen answer last, ``rejected_response``, ``videos``; the tag <video> first in the
prompt.

Read: that; ``rejected_response`` as a list of one message; ``rejected_messages`` with ``rejected_videos``, where they
begin as ``messages`` does; ``video`` for ``videos``.
"""

from __future__ import annotations

from tempo_fast.pairs.formats.rows import VIDEO_TAG, ForeignRow, Layout, Pair, Row, RowError, answer_text, turns_of
from tempo_fast.schema import PreferenceRecord, Rejected


def _write(record: PreferenceRecord, rejected: Rejected, extra: Row) -> Row:
    return {
        "messages": [
            {"role": "user", "content": (VIDEO_TAG if record.video else "") + record.prompt},
            {"role": "assistant", "content": record.chosen},
        ],
        "rejected_response": rejected.text,
        "videos": [record.video] if record.video else [],
    }


def _read(row: ForeignRow) -> Pair:
    turns = turns_of(row.row.get("messages"), "messages")
    if turns[-1].role != "assistant":
        raise RowError("messages", f"must end with the assistant's answer, got {[t.role for t in turns]}")
    turn = row.only_turn(turns[:-1], "messages")
    video = row.video("videos", "video", inline=turn.videos)
    other = row.row.get("rejected_messages")
    if other is not None:
        if not isinstance(other, list) or other[:-1] != row.row["messages"][:-1]:
            raise RowError("rejected_messages", "must begin as 'messages' does")
        rejected = answer_text(other[-1:], "rejected_messages")
    else:
        rejected = answer_text(row.row.get("rejected_response"), "rejected_response")
    if (seen := row.video("rejected_videos")) not in ("", video):
        raise RowError("rejected_videos", f"names another video ({seen}); one is supported")
    return Pair(video, row.prompt("messages", turn.tagged, video), turns[-1].text, rejected)


MS_SWIFT = Layout(
    name="ms-swift",
    columns=frozenset({"messages", "rejected_response", "rejected_messages", "videos", "video", "rejected_videos"}),
    id_column="",
    claims=lambda row: "rejected_response" in row or "rejected_messages" in row or "messages" in row,
    write=_write,
    read=_read,
    tags=(VIDEO_TAG, "<image>", "<audio>"),
    schema={"messages": [{"role": str, "content": str}], "rejected_response": str, "videos": [str]},
)
