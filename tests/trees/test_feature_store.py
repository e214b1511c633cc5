"""Features on disk: equal to fresh ones, capped, shared by processes, never damaged ones nor those of other weights."""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tempo_fast.errors import InputError
from tempo_fast.runtime.ranks import Ranks
from tempo_fast.training.decodable import DecodeCheck
from tempo_fast.trees import feature_store
from tempo_fast.trees.feature_store import FeatureStore, tower_digest
from tempo_fast.trees.vision import FeatureCache

CAP = 1 << 30


def features_of(bundle: Any, reader: Any, plans: list[Any], store: FeatureStore | None, **more: Any) -> Any:
    """(features, cache) of a run of its own: nothing in memory yet."""
    cache = FeatureCache(store=store)
    return cache.features(bundle.family, bundle.model, reader, plans, **more), cache


def files_of(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.safetensors"))


def test_a_second_run_neither_decodes_nor_encodes(tiny: Any, reader: Any, make_plan: Any, tmp_path: Path) -> None:
    plans = [make_plan("a", 3), make_plan("b", 2, 56, 28), make_plan("a", 3)]
    without, _ = features_of(tiny, reader, plans, None)
    fresh, first = features_of(tiny, reader, plans, FeatureStore(tmp_path, CAP))
    assert torch.equal(fresh, without) and first.counts() == {"hits": 0, "disk_hits": 0, "misses": 2}
    reader.calls.clear()
    calls: list[int] = []
    handle = tiny.family.vision_tower(tiny.model).register_forward_hook(lambda *_: calls.append(1))
    again, second = features_of(tiny, reader, plans, FeatureStore(tmp_path, CAP))
    handle.remove()
    assert torch.equal(again, fresh) and again.dtype == fresh.dtype and not again.requires_grad
    assert reader.calls == [] and calls == [] and second.decode_seconds == 0
    assert second.counts() == {"hits": 2, "disk_hits": 2, "misses": 0}
    second.features(tiny.family, tiny.model, reader, plans)
    assert second.counts() == {"hits": 4, "disk_hits": 2, "misses": 0}  # memory stands before the disk


def test_deeper_features_come_back(successor: Any, reader: Any, make_plan: Any, tmp_path: Path) -> None:
    plan = make_plan("a", 4, 64, 32, patch=16) if successor.family.name == "qwen3_vl" else make_plan("a", 4)
    fresh, _ = features_of(successor, reader, [plan], FeatureStore(tmp_path, CAP))
    width = successor.config.get_text_config().hidden_size
    assert (fresh.shape[1] > width) == (successor.family.name == "qwen3_vl")
    again, cache = features_of(successor, reader, [plan], FeatureStore(tmp_path, CAP))
    assert torch.equal(again, fresh) and cache.disk_hits == 1


def test_towers_of_several_modules(frames: Any, make_plan: Any, tmp_path: Path) -> None:
    grid, shape = frames.geometry.smallest()

    class Reader:
        calls = 0

        def pixels(self, plan: Any) -> torch.Tensor:
            self.calls += 1
            return torch.randn(shape, generator=torch.Generator().manual_seed(3))

    plan = copy.copy(make_plan("a", 1))
    object.__setattr__(plan, "__class__", type("Plan", (type(plan),), {"grid": tuple(grid)}))
    reader = Reader()
    fresh, _ = features_of(frames, reader, [plan], FeatureStore(tmp_path, CAP))
    again, _ = features_of(frames, reader, [plan], FeatureStore(tmp_path, CAP))
    assert torch.equal(again, fresh) and reader.calls == 1


@pytest.mark.parametrize("together", [False, True])
def test_bfloat16_rounds_alike_with_and_without_the_disk(
    tiny: Any, reader: Any, make_plan: Any, tmp_path: Path, together: bool
) -> None:
    plans = [make_plan("a", 3), make_plan("b", 4)]
    exact, _ = features_of(tiny, reader, plans, FeatureStore(tmp_path / "same", CAP))
    fresh, _ = features_of(tiny, reader, plans, FeatureStore(tmp_path / "half", CAP, "bfloat16"), together=together)
    assert fresh.dtype == torch.float32 and not torch.equal(fresh, exact)
    again, cache = features_of(tiny, reader, plans, FeatureStore(tmp_path / "half", CAP, "bfloat16"))
    assert torch.equal(again, exact.bfloat16().float()) and again.dtype == torch.float32
    if together:  # encoded in company, which can change a rounding: not kept
        assert cache.disk_hits == 0
    else:
        assert torch.equal(again, fresh) and cache.disk_hits == 2
    # a folder may hold both
    assert torch.equal(features_of(tiny, reader, plans, FeatureStore(tmp_path / "half", CAP))[0], exact)


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    value = torch.randn(8, 16)
    store = FeatureStore(tmp_path, CAP)
    store.put("t" * 64, "a", value)
    size = files_of(tmp_path)[0].stat().st_size
    store = FeatureStore(tmp_path, 3 * size)
    store.put("t" * 64, "b", value + 1)
    store.put("u" * 64, "c", value + 2)  # another tower's count as well
    assert torch.equal(store.get("t" * 64, "a"), value)
    store.put("t" * 64, "d", value + 3)
    assert store.get("t" * 64, "b") is None and len(files_of(tmp_path)) == 3
    assert all(store.holds(key) for key in "acd") and not store.holds("b")
    assert torch.equal(store.get("u" * 64, "c"), value + 2)
    small = FeatureStore(tmp_path / "small", size - 1)
    small.put("t" * 64, "a", value)
    assert files_of(tmp_path / "small") == []


TOWER = "0" * 64


def value_of(key: int) -> torch.Tensor:
    return torch.full((32, 8 + key), float(key))


def write_and_read(root: str, cap: int, start: Any, wrong: Any) -> None:
    store = FeatureStore(root, cap)
    start.wait()
    for round_ in range(12):
        for key in range(6):
            store.put(TOWER, str(key), value_of(key))
            found = store.get(TOWER, str((key + round_) % 6))
            if found is not None and not torch.equal(found, value_of((key + round_) % 6)):
                wrong.value += 1


def test_two_processes_share_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    FeatureStore(tmp_path / "one", CAP).put(TOWER, "5", value_of(5))
    cap = 4 * files_of(tmp_path / "one")[0].stat().st_size
    context = multiprocessing.get_context("fork")
    start, wrong = context.Barrier(2), context.Value("i", 0)
    args = (str(tmp_path / "two"), cap, start, wrong)
    workers = [context.Process(target=write_and_read, args=args) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [w.exitcode for w in workers] == [0, 0] and wrong.value == 0
    left = files_of(tmp_path / "two")
    assert left and sum(f.stat().st_size for f in left) <= cap
    store = FeatureStore(tmp_path / "two", cap)
    assert all(torch.equal(store.get(TOWER, f.stem), value_of(int(f.stem))) for f in left)
    assert not list((tmp_path / "two").glob("*/.*")) and not caplog.records


def cut(data: bytes) -> bytes:
    return data[:-3]


def empty(data: bytes) -> bytes:
    return b""


def flip_value(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 4]) + data[-4:]


def other_dtype(data: bytes) -> bytes:
    return data.replace(b'"F32"', b'"I32"')


def other_shape(data: bytes) -> bytes:
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    header["features"]["shape"].reverse()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + n :]


def other_header(data: bytes) -> bytes:
    return data.replace(b'"dtype":"float32"', b'"dtype":"float64"')


@pytest.mark.parametrize("damage", [cut, empty, flip_value, other_dtype, other_shape, other_header])
def test_a_damaged_file_is_dropped_and_made_again(
    tiny: Any, reader: Any, make_plan: Any, tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plans = [make_plan("a", 6)]
    fresh, _ = features_of(tiny, reader, plans, FeatureStore(tmp_path, CAP))
    [path] = files_of(tmp_path)
    sound = path.read_bytes()
    assert damage(sound) != sound
    path.write_bytes(damage(sound))
    again, cache = features_of(tiny, reader, plans, FeatureStore(tmp_path, CAP))
    assert torch.equal(again, fresh) and cache.counts() == {"hits": 0, "disk_hits": 0, "misses": 1}
    assert "damaged" in caplog.text and path.name in caplog.text
    repaired, cache = features_of(tiny, reader, plans, FeatureStore(tmp_path, CAP))
    assert torch.equal(repaired, fresh) and cache.disk_hits == 1


def test_a_file_in_anothers_place_is_not_served(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, CAP)
    store.put("a" * 64, "x", torch.ones(2, 3))
    [path] = files_of(tmp_path)
    path.rename(path.with_name("y.safetensors"))
    assert store.get("a" * 64, "y") is None
    store.put("a" * 64, "x", torch.ones(2, 3))
    assert store.get("a" * 16 + "b" * 48, "x") is None  # as far as the folder's name goes the same tower


def test_stale_weights_are_never_served(tiny: Any, lora: Any, reader: Any, make_plan: Any, tmp_path: Path) -> None:
    plans, store = [make_plan("a", 2)], FeatureStore(tmp_path, CAP)
    before, _ = features_of(tiny, reader, plans, store)
    own = copy.copy(tiny)
    own.model = copy.deepcopy(tiny.model)
    same, cache = features_of(own, reader, plans, store)
    assert cache.disk_hits == 1  # equal weights, another object
    weight = next(own.family.vision_tower(own.model).parameters())
    with torch.no_grad():
        weight.mul_(1.5)
    moved = cache.features(own.family, own.model, reader, plans)
    assert cache.misses == 1 and not torch.equal(moved, before)
    assert torch.equal(features_of(own, reader, plans, None)[0], moved)
    n = len(files_of(tmp_path))
    adapted = lora(tiny, vision=True)
    on, cache = features_of(adapted, reader, plans, store)
    assert cache.misses == 1 and not torch.equal(on, before) and len(files_of(tmp_path)) == n
    own.model.requires_grad_(True)
    _, cache = features_of(own, reader, plans, store)
    assert cache.disk_hits == 0 and len(files_of(tmp_path)) == n


def test_settings_that_decide_features_belong_to_the_tower(tiny: Any) -> None:
    model = copy.deepcopy(tiny.model)
    known = tower_digest(tiny.family, tiny.model)
    model.set_attn_implementation({"text_config": "eager"})
    model.config.dtype = torch.bfloat16  # what the weights are in is seen from the weights
    model.config.text_config.rms_norm_eps = 1e-3
    assert tower_digest(tiny.family, model) == known
    model.config.vision_config.spatial_merge_size = 1
    assert tower_digest(tiny.family, model) != known
    assert tower_digest(tiny.family, copy.deepcopy(tiny.model).bfloat16()) != known


def test_a_full_disk_costs_the_cache_alone(
    tiny: Any, reader: Any, make_plan: Any, tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[Path] = []

    def full(path: Path, write: Any) -> None:
        tries.append(path)
        raise InputError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(feature_store, "write_atomic", full)
    plans = [make_plan("a", 2), make_plan("b", 2)]
    found, _ = features_of(tiny, reader, plans, FeatureStore(tmp_path, CAP))
    assert torch.equal(found, features_of(tiny, reader, plans, None)[0])
    warned = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(tries) == 1 and len(warned) == 1 and "No space left" in caplog.text


def test_opening(tmp_path: Path) -> None:
    folder = tmp_path / "store" / "0123"
    folder.mkdir(parents=True)
    old, new = folder / ".a.safetensors.1.tmp", folder / ".b.safetensors.2.tmp"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 1e6,) * 2)
    FeatureStore(tmp_path / "store", CAP)
    assert not old.exists() and new.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"features\.disk: .*file"):
        FeatureStore(tmp_path / "file", CAP)


def test_the_decode_check_trusts_what_was_decoded_once(tiny: Any, reader: Any, make_plan: Any, tmp_path: Path) -> None:
    plans, store = [make_plan("a", 2), make_plan("b", 2)], FeatureStore(tmp_path / "features", CAP)
    _, cache = features_of(tiny, reader, plans[:1], store)
    reader.calls.clear()
    check = DecodeCheck(tmp_path / "decoded.jsonl", reader, Ranks(), decoded=cache.holds)
    assert check.failures(plans, lambda: None) == {} and reader.calls == [plans[1].key]
