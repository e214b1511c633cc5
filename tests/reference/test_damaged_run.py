"""Bytes of the store that flip while a run is stopped change nothing of what it makes."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
from curricula import After, curriculum

from tempo_fast.errors import Interrupted
from tempo_fast.files import file_digest

SETTINGS = {"train__max_tokens": 90}  # several packs, so several shards, a stage


def results(out: Path) -> list[str]:
    files = sorted(p for p in (out / "train").rglob("*.safetensors") if "checkpoint" not in str(p))
    return [f"{p.relative_to(out)} {file_digest(p)}" for p in files]


def shards(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "reference").rglob("*.safetensors"))


def flip(out: Path, rng: random.Random, bytes_: int = 3) -> set[str]:
    """Three bits, anywhere in the store; returns the shards that they hit."""
    files = sorted((out / "reference").rglob("*.safetensors"))
    hit = set()
    for _ in range(bytes_):
        path = rng.choices(files, [p.stat().st_size for p in files])[0]
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        hit.add(path.name)
    return hit


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"out": tmp_path_factory.mktemp("undisturbed"), "results": {}}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("mode", "keep"), [("base", "mean_embedding"), ("base", "hidden"), ("previous_stage", "mean_embedding")]
)
def test_three_flipped_bytes(
    tmp_path: Path, tiny_path: str, reader: Any, plan_type: Any, undisturbed: dict[str, Any],
    caplog: pytest.LogCaptureFixture, mode: str, keep: str, seed: int,
) -> None:  # fmt: skip
    """Before the first stage (even seeds), and in the second one, whose chosen answers the first has computed."""
    changes = {**SETTINGS, "reference__mode": mode, "reference__keep": keep}
    name = f"{mode} {keep}"
    if name not in undisturbed["results"]:
        curriculum(undisturbed["out"] / name, tiny_path, reader, plan_type, sft=False, **changes).run()
        undisturbed["results"][name] = results(undisturbed["out"] / name)
    start = lambda **more: curriculum(tmp_path, tiny_path, reader, plan_type, sft=False, **changes, **more)  # noqa: E731
    if seed % 2 == 0:
        start().fill_reference()
    else:
        looks = 1
        while not (tmp_path / "train" / "stage2_r2" / "metrics.jsonl").is_file():
            with pytest.raises(Interrupted):
                start(stopper=After(looks)).run()
            looks += 2
    hit = flip(tmp_path, random.Random(seed))
    with caplog.at_level(logging.WARNING, "tempo_fast"):
        start().run()
    assert results(tmp_path) == undisturbed["results"][name] and results(tmp_path)
    # those that the run reads, all but the first stage's where the second has a reference of its own, were found
    dropped = {shard for shard in hit if f"{shard}: damaged" in caplog.text}
    assert dropped == hit or mode == "previous_stage"
    if mode == "base":
        assert shards(tmp_path) == shards(undisturbed["out"] / name)
