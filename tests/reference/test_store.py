"""The store: what is put is got, whatever is killed, damaged or mixed up."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tempo_fast.errors import InputError
from tempo_fast.models.family import Grid, Prompt
from tempo_fast.reference.store import ReferenceStore
from tempo_fast.trees.layout import Branch, ResponseTree
from tempo_kernels.head import HeadStatistics

FIELDS = {"reference": "abc", "head": "def"}
D = 5


def statistics(n: int, *, kl: bool, seed: int = 0) -> HeadStatistics:
    g = torch.Generator().manual_seed(seed)
    scalars = [torch.randn(n, generator=g) for _ in range(3)]
    mean = torch.randn(n, D, generator=g)
    return HeadStatistics(scalars[0], scalars[1], scalars[2] if kl else None, mean if kl else None)


def shards(root: Path) -> list[Path]:
    return sorted((root / "shards").glob("*.safetensors"))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4), min_size=1, max_size=4), st.booleans(), st.randoms()
)
def test_get_returns_what_was_put(
    tmp_path_factory: pytest.TempPathFactory, puts: list[list[int]], kl: bool, rng: random.Random
) -> None:
    root = tmp_path_factory.mktemp("store")
    store, truth = ReferenceStore(root, FIELDS), {}
    for i, sizes in enumerate(puts):
        entries = {f"{i}.{j}": statistics(n, kl=kl, seed=100 * i + j) for j, n in enumerate(sizes)}
        truth |= entries
        store.put(entries)
    keys = [rng.choice(list(truth)) for _ in range(6)]  # any order, repeats
    for opened in (store, ReferenceStore(root, FIELDS)):
        assert len(opened) == len(truth) and opened.missing(list(truth), kl=kl) == []
        got = opened.get(keys, kl=kl)
        for name in ("logp", "lse", "mean_logit", "mean_embedding") if kl else ("logp", "lse"):
            assert torch.equal(getattr(got, name), torch.cat([getattr(truth[k], name) for k in keys]))
        assert (got.mean_embedding is None) == (not kl)
        assert (opened.hits, opened.misses) == (6, 0)


def test_missing_keys_are_reported_and_counted(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, FIELDS)
    store.put({"a": statistics(2, kl=False)})
    assert store.missing(["b", "a", "b"]) == ["b"]
    store.kl = True  # the default of missing and get
    assert store.missing(["a"]) == ["a"]
    with pytest.raises(InputError, match="2 of 3 answers are missing"):
        store.get(["a", "b", "c"], kl=False)
    assert (store.hits, store.misses) == (1, 2)
    with pytest.raises(ValueError, match="all have or all lack"):
        store.put({"c": statistics(1, kl=False), "d": statistics(1, kl=True)})


def test_an_entry_with_kl_wins_whatever_the_order(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, FIELDS)
    store.put({"a": statistics(3, kl=True, seed=1)})
    store.put({"a": statistics(3, kl=False, seed=1)})
    for opened in (store, ReferenceStore(tmp_path, FIELDS)):
        assert opened.missing(["a"], kl=True) == []


def test_other_fields_are_refused_by_name(tmp_path: Path) -> None:
    ReferenceStore(tmp_path, FIELDS).put({"a": statistics(1, kl=False)})
    with pytest.raises(InputError, match="field 'head' is 'def' there and 'xyz' in this run"):
        ReferenceStore(tmp_path, {**FIELDS, "head": "xyz"})
    with pytest.raises(InputError, match="field 'extra'"):
        ReferenceStore(tmp_path, {**FIELDS, "extra": 1})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["fields"] == FIELDS


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path, seed: int) -> None:
    """Header length, header, payload: the shard is dropped, its answers are missing, the others are not."""
    store = ReferenceStore(tmp_path, FIELDS)
    store.put({"a": statistics(4, kl=True), "b": statistics(2, kl=True)})
    damaged = shards(tmp_path)[0]
    store.put({"c": statistics(3, kl=True)})
    data = bytearray(damaged.read_bytes())
    at = [0, 3, 9, 40, len(data) - 1][seed] if seed < 5 else random.Random(seed).randrange(len(data))
    data[at] ^= 1 << (seed % 8)
    damaged.write_bytes(data)
    again = ReferenceStore(tmp_path, FIELDS)
    assert sorted(again.missing(["a", "b", "c"], kl=True)) == ["a", "b"]
    assert not damaged.exists()
    again.put({"a": statistics(4, kl=True), "b": statistics(2, kl=True)})
    assert torch.equal(again.get(["b"], kl=True).logp, statistics(2, kl=True).logp)


def test_a_damaged_upgrade_falls_back_to_the_scalars(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, FIELDS)
    store.put({"a": statistics(4, kl=False)})
    old = set(shards(tmp_path))
    store.put({"a": statistics(4, kl=True)})
    (new,) = set(shards(tmp_path)) - old
    new.write_bytes(new.read_bytes()[:-3])  # truncated
    again = ReferenceStore(tmp_path, FIELDS)
    assert again.missing(["a"], kl=True) == ["a"] and again.missing(["a"], kl=False) == []
    assert torch.equal(again.get(["a"], kl=False).logp, statistics(4, kl=False).logp)


def test_a_damaged_or_lost_manifest_is_written_again(tmp_path: Path) -> None:
    ReferenceStore(tmp_path, FIELDS).put({"a": statistics(2, kl=False)})
    path = tmp_path / "manifest.json"
    whole = path.read_text()
    for text in ("{", "[]", None):
        path.unlink() if text is None else path.write_text(text)
        assert ReferenceStore(tmp_path, FIELDS).missing(["a"]) == []
        assert path.read_text() == whole
    # the shards carry their identity: another reference does not take them for its own
    path.unlink()
    assert ReferenceStore(tmp_path, {"reference": "other"}).missing(["a"]) == ["a"]


def test_full_disk_is_one_sentence_and_leaves_the_store_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ReferenceStore(tmp_path, FIELDS)
    store.put({"a": statistics(2, kl=False)})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("tempo_fast.files.os.fsync", full)
        with pytest.raises(InputError, match="cannot be written .No space left"):
            store.put({"b": statistics(2, kl=False)})
    assert store.missing(["a", "b"]) == ["b"]
    assert ReferenceStore(tmp_path, FIELDS).missing(["a", "b"]) == ["b"]
    assert [p for p in (tmp_path / "shards").iterdir() if p.suffix != ".safetensors"] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_leaves_whole_shards(tmp_path: Path) -> None:
    rng = random.Random(3)
    ReferenceStore(tmp_path, FIELDS)
    for round_ in range(6):
        pid = os.fork()
        if pid == 0:
            store = ReferenceStore(tmp_path, FIELDS)
            for i in range(10_000):
                store.put({f"{round_}.{i}": statistics(400, kl=True, seed=i)})
            os._exit(0)
        time.sleep(0.01 + 0.1 * rng.random())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        store = ReferenceStore(tmp_path, FIELDS)
        keys = store.known(kl=True)
        assert store.missing(keys, kl=True) == []
        for key in keys:
            assert torch.equal(store.get([key]).logp, statistics(400, kl=True, seed=int(key.split(".")[1])).logp)
    assert len(keys) > 6


def test_writers_see_each_other_after_refresh(tmp_path: Path) -> None:
    one, two = ReferenceStore(tmp_path, FIELDS), ReferenceStore(tmp_path, FIELDS)
    one.put({"a": statistics(2, kl=False)})
    assert two.missing(["a"]) == ["a"]
    two.refresh()
    assert two.missing(["a"]) == []


def test_stale_temporary_files_are_swept(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, FIELDS)
    store.put({"a": statistics(1, kl=False)})
    old, new = tmp_path / "shards" / ".x.1.tmp", tmp_path / "shards" / ".y.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    ReferenceStore(tmp_path, FIELDS)
    assert not old.exists() and new.exists()


def tree(**change: Any) -> ResponseTree:
    prompt = change.get("prompt", [5, 6, 7])
    positions = change.get("positions", [[0, 1, 2]] * 3)
    return ResponseTree(
        change.get("id", "r"),
        Prompt(torch.tensor(prompt), torch.tensor(positions), torch.zeros(len(prompt), dtype=torch.bool)),
        [Branch.of(change.get("answer", [1, 2]))],
        [SimpleNamespace(key=k, grid=Grid(1, 2, 2)) for k in change.get("plans", ["v"])],
    )


def test_keys_depend_on_what_decides_the_statistics_alone(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, FIELDS)
    base = store.key(tree(), 0)
    assert base == store.key(tree(id="another name"), 0)
    changes = [
        {"plans": ["w"]}, {"plans": []}, {"plans": ["v", "v"]}, {"prompt": [5, 6, 8]}, {"answer": [1]},
        {"answer": [1, 2, 2]}, {"prompt": [5, 6, 7, 1], "positions": [[0, 1, 2, 3]] * 3, "answer": [2]},
        {"positions": [[0, 1, 3]] * 3},
    ]  # fmt: skip
    keys = [store.key(tree(**change), 0) for change in changes]
    assert len({base, *keys}) == len(changes) + 1
    other = ReferenceStore(tmp_path / "other", {**FIELDS, "head": "x"})
    assert other.key(tree(), 0) != base
    assert ReferenceStore(tmp_path, FIELDS).key(tree(), 0) == base


def test_the_fields_of_a_bundle_name_the_architecture(tiny_path: str, tmp_path: Path) -> None:
    """The same weights under another rope are another reference."""
    import shutil

    from tempo_fast.models.load import load_bundle
    from tempo_fast.reference.store import compatible_fields, reference_fields

    other = tmp_path / "model"
    shutil.copytree(tiny_path, other)
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 500.0
    (other / "config.json").write_text(json.dumps(config))
    bundles = [load_bundle(path, "float32", "cpu") for path in (tiny_path, str(other))]
    assert bundles[0].weights_digest == bundles[1].weights_digest
    root = tmp_path / "store"
    ReferenceStore(root, reference_fields(bundles[0]), compatible=compatible_fields(bundles[0]))
    with pytest.raises(InputError, match="field 'config'"):
        ReferenceStore(root, reference_fields(bundles[1]))
    half = load_bundle(tiny_path, "bfloat16", "cpu")
    assert reference_fields(half) == reference_fields(bundles[0])
    assert compatible_fields(half) == {**compatible_fields(bundles[0]), "dtype": "bfloat16"}
    ReferenceStore(root, reference_fields(half), compatible=compatible_fields(half))
    empty = load_bundle(tiny_path, "float32", "cpu", weights=False)
    assert reference_fields(empty) == reference_fields(half)
    assert compatible_fields(empty) == compatible_fields(bundles[0])
    assert compatible_fields(empty, "dense") == {**compatible_fields(empty), "attention": "dense"}


@pytest.mark.parametrize("form", ["scalars", "mean_embedding", "hidden.bfloat16", "hidden.float32"])
def test_a_shard_is_a_safetensors_file_and_always_the_same(tmp_path: Path, form: str) -> None:
    from safetensors.torch import load_file

    entries = {f"{i}": statistics(1 + i, kl=form == "mean_embedding", seed=i) for i in range(3)}
    hidden = None
    if form.startswith("hidden"):
        dtype = getattr(torch, form.removeprefix("hidden."))
        hidden = {key: torch.randn(len(s.logp), D).to(dtype) for key, s in entries.items()}
    names = {ReferenceStore(tmp_path / x, FIELDS).put(entries, hidden) for x in "ab"}
    assert len(names) == 1 and names == {p.name for p in shards(tmp_path / "a")}
    tensors = load_file(shards(tmp_path / "a")[0])
    for name in ("logp", "lse"):
        assert torch.equal(tensors[name], torch.cat([getattr(s, name) for s in entries.values()]))
    if hidden is not None:
        assert torch.equal(tensors["hidden"], torch.cat(list(hidden.values())))
        assert "mean_embedding" not in tensors


def test_shards_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Written by safetensors itself, without ``form``."""
    import hashlib

    from safetensors.torch import save

    from tempo_fast.files import canonical_json

    for kl in (False, True):
        truth = statistics(5, kl=kl, seed=7)
        header = {
            "format": "1", "fields": canonical_json(FIELDS), "kl": str(int(kl)),
            "rows": json.dumps([["a", 0, 2], ["b", 2, 3]]),
        }  # fmt: skip
        payload = save({k: v for k, v in truth._asdict().items() if v is not None}, header)
        path = tmp_path / str(kl) / "shards" / f"{hashlib.sha256(payload).hexdigest()}.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(payload)
        store = ReferenceStore(tmp_path / str(kl), FIELDS)
        assert store.missing(["a", "b"], kl=kl) == []
        found = store.get(["b", "a"], kl=kl)
        assert torch.equal(found.logp, truth.logp[[2, 3, 4, 0, 1]])
        assert kl == (found.mean_embedding is not None)


def test_hidden_states_serve_their_dtype_and_all_serve_scalars(tmp_path: Path) -> None:
    scalars, hidden = {"a": statistics(3, kl=False)}, {"a": torch.randn(3, D).bfloat16()}
    ReferenceStore(tmp_path, FIELDS).put(scalars, hidden)
    opened = {
        f: ReferenceStore(tmp_path, FIELDS, form=f) for f in ("mean_embedding", "hidden.bfloat16", "hidden.float32")
    }
    for form, store in opened.items():
        store.kl = True
        assert store.missing(["a"]) == ([] if form == "hidden.bfloat16" else ["a"])
        assert store.missing(["a"], kl=False) == []
        assert torch.equal(store.get(["a"], False).lse, scalars["a"].lse)
        assert torch.equal(store.read(["a"], False).logp, scalars["a"].logp)
    assert torch.equal(opened["hidden.bfloat16"].read(["a", "a"]), torch.cat([hidden["a"]] * 2))
    with pytest.raises(InputError, match="missing"):
        opened["hidden.float32"].read(["a"])


def test_a_shard_cut_off_after_it_was_verified_is_dropped_not_crashed_on(tmp_path: Path) -> None:
    ReferenceStore(tmp_path, FIELDS).put({"a": statistics(400, kl=True)})
    for cut in (5, 3000, 100_000):
        ReferenceStore(tmp_path, FIELDS).put({"a": statistics(400, kl=True)})
        store = ReferenceStore(tmp_path, FIELDS)
        assert store.missing(["a"], kl=True) == []
        (path,) = shards(tmp_path)
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(InputError, match="1 of 1 answers are missing or damaged"):
            store.get(["a"], kl=True)
        assert store.missing(["a"], kl=True) == ["a"]


def test_a_damaged_shard_that_another_process_has_replaced_stays(tmp_path: Path) -> None:
    """Both find the damage, one drops and computes again before the other drops."""
    one, two = ReferenceStore(tmp_path, FIELDS), ReferenceStore(tmp_path, FIELDS)
    name = one.put({"a": statistics(4, kl=True)})
    two.refresh()
    path, whole = tmp_path / "shards" / name, (tmp_path / "shards" / name).read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = ReferenceStore(tmp_path, FIELDS)
    assert again.missing(["a"], kl=True) == ["a"]
    assert again.put({"a": statistics(4, kl=True)}) == name  # the same name again
    two._drop(name, "as it was read before")
    assert path.read_bytes() == whole and [p.name for p in (tmp_path / "shards").iterdir()] == [name]
    two.adopt([name])
    for store in (two, again, ReferenceStore(tmp_path, FIELDS)):
        assert store.missing(["a"], kl=True) == []
        assert torch.equal(store.get(["a"], True).logp, statistics(4, kl=True).logp)
