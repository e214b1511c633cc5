"""LLaVA-Hound's preference rows, as in sft_dpo_17k.jsonl (llava_hound_dpo/dpo_scripts/run_dpo.py of
RifleZhang/LLaVA-Hound-DPO, commit ec2381f).

Written: ``id``, ``video``, ``prompt`` beginning with the tag <video> on a line of its own, ``chosen``, ``rejected``.

Read: that. The released file also has ``answer`` (the ground truth), ``chosen_score`` and ``rejected_score``, which are
extra; its ``video`` names a folder of frames or a file without its suffix, and is taken as it stands.
"""

from __future__ import annotations

from tempo_fast.pairs.formats.rows import VIDEO_TAG, ForeignRow, Layout, Pair, Row
from tempo_fast.schema import PreferenceRecord, Rejected

_TAG = VIDEO_TAG + "\n"


def _write(record: PreferenceRecord, rejected: Rejected, extra: Row) -> Row:
    return {
        "id": extra.get("id", record.id),
        "video": record.video,
        "prompt": (_TAG if record.video else "") + record.prompt,
        "chosen": record.chosen,
        "rejected": rejected.text,
    }


def _read(row: ForeignRow) -> Pair:
    video = row.video("video")
    prompt = row.prompt("prompt", row.text("prompt"), video, _TAG)
    return Pair(video, prompt, row.text("chosen"), row.text("rejected"))


LLAVA_HOUND = Layout(
    name="llava-hound",
    columns=frozenset({"video", "prompt", "chosen", "rejected"}),
    id_column="id",
    claims=lambda row: isinstance(row.get("prompt"), str) and isinstance(row.get("rejected"), str) and "video" in row,
    write=_write,
    read=_read,
    tags=(VIDEO_TAG,),
    schema={"id": str, "video": str, "prompt": str, "chosen": str, "rejected": str},
)
