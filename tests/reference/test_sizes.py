"""What a fill takes is known, and refused before anything is decoded; a full disk loses nothing."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tempo_fast.errors import InputError
from tempo_fast.reference.fill import fill
from tempo_fast.reference.shard import form_of
from tempo_fast.reference.sizes import bytes_per_token, check_room, readable, room_for
from tempo_fast.reference.store import ReferenceStore
from tempo_fast.trees.layout import ResponseTree, build_tree
from tempo_fast.trees.vision import FeatureCache


def trees_of(bundle: Any, make_plan: Any, n: int = 6) -> list[ResponseTree]:
    return [
        build_tree(
            bundle.family, bundle.tokenizer, bundle.config, id=f"t{i}", prompt_text="What happened?",
            answers=[f"A red circle {i}" * (1 + i), "It appears at last."], plans=[make_plan(f"v{i}", 3)],
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("keep", ["mean_embedding", "hidden"])
@pytest.mark.parametrize("kl", [False, True])
def test_the_estimate_is_what_is_written(
    tiny: Any, reader: Any, make_plan: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, keep: str, kl: bool
) -> None:
    trees = trees_of(tiny, make_plan)
    store = ReferenceStore(tmp_path, {"reference": "tiny"}, form=form_of(keep, torch.float32))
    with caplog.at_level(logging.INFO, "tempo_fast"):
        report = fill(tiny, store, trees, reader, FeatureCache(), kl=kl, max_tokens=200)
    files = list((tmp_path / "shards").iterdir())
    assert report.computed == 12 and len(files) > 1
    form = store.form if kl else "scalars"
    room = room_for(tmp_path, 12, report.tokens, len(files), bytes_per_token(tiny, form))
    written = sum(p.stat().st_size for p in files)
    assert written <= room.bytes <= written + 2100 * len(files)
    assert f"12 answers of {report.tokens} tokens, {readable(room.bytes)}" in caplog.text and "free" in caplog.text
    caplog.clear()
    fill(tiny, store, trees, reader, FeatureCache(), kl=kl, max_tokens=200)
    assert "to compute" not in caplog.text


def test_too_small_a_disk_is_refused_before_decoding(tiny: Any, reader: Any, make_plan: Any, small_disk: Path) -> None:
    trees = trees_of(tiny, make_plan, 40)
    store = ReferenceStore(small_disk / "store", {"reference": "tiny"})
    with pytest.raises(InputError, match="take .* MiB and the disk has .* KiB free.*or reference.keep to hidden") as e:
        fill(tiny, store, trees, reader, FeatureCache(), kl=True, max_tokens=4096)
    assert "\n" not in str(e.value) and reader.calls == [] and len(store) == 0
    # without the KL it fits
    fill(tiny, store, trees[:6], reader, FeatureCache(), kl=False, max_tokens=4096)
    assert len(store) == 12


def test_a_disk_that_fills_up_all_the_same(
    tiny: Any, reader: Any, make_plan: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees, stored = trees_of(tiny, make_plan, 20), []
    store = ReferenceStore(small_disk / "store", {"reference": "tiny"})
    monkeypatch.setattr("tempo_fast.reference.fill.check_room", lambda *a: None)

    def run() -> Any:
        return fill(tiny, store, trees, reader, FeatureCache(), kl=True, max_tokens=200, on_stored=stored.extend)

    with pytest.raises(InputError, match="cannot be written .No space left"):
        run()
    assert stored and store.missing(stored, kl=True) == []
    assert all(p.suffix == ".safetensors" for p in (small_disk / "store" / "shards").iterdir())
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    once = set(stored)
    report = run()
    assert report.present == len(once) and len(stored) == len(set(stored)) == 40
    assert store.missing(stored, kl=True) == []


def test_the_margin_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for total, margin in ((10**8, 2 * 10**6), (10**13, 2**30)):
        monkeypatch.setattr("tempo_fast.reference.sizes.free_bytes", lambda root, t=total: (5 * 10**9, t))
        room = room_for(tmp_path, 1, 1, 0, 0)._replace(bytes=10**6, free=10**6 + margin)
        check_room(tmp_path, room, "scalars")
        with pytest.raises(InputError, match="larger disk$"):
            check_room(tmp_path, room._replace(free=room.free - 1), "scalars")


def test_bytes_as_people_read_them() -> None:
    assert [readable(n) for n in (0, 1023, 1536, 3 * 2**30, 2**40 * 2)] == [
        "0 B", "1023 B", "1.5 KiB", "3 GiB", "2 TiB",
    ]  # fmt: skip
