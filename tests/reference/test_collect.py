"""ls, verify and gc: nothing that a run needs is lost, and what is said is what is done."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tempo_fast.cli import main
from tempo_fast.reference import collect as collecting
from tempo_fast.reference.collect import collect
from tempo_fast.reference.shard import form_of
from tempo_fast.reference.store import ReferenceStore
from tempo_kernels.head import HeadStatistics

FIELDS = {"reference": "abc", "family": "tiny"}
HIDDEN = form_of("hidden", torch.bfloat16)
D = 3


def put(root: Path, keys: list[str], form: str, seed: int = 0, fields: dict = FIELDS) -> str:
    g = torch.Generator().manual_seed(seed)
    entries, hidden = {}, {}
    for key in keys:
        n = 1 + int(torch.randint(4, (1,), generator=g))
        logp, lse, mean_logit = torch.randn(3, n, generator=g)
        mean = torch.randn(n, D, generator=g)
        kl = form == "mean_embedding"
        entries[key] = HeadStatistics(logp, lse, mean_logit if kl else None, mean if kl else None)
        hidden[key] = mean.bfloat16()
    return ReferenceStore(root, fields).put(entries, hidden if form == HIDDEN else None)


def everything(root: Path) -> dict[tuple[str, str], list[list[float]]]:
    """All that can be read, by form and key."""
    out = {}
    for form in ("scalars", "mean_embedding", HIDDEN):
        store = ReferenceStore(root, FIELDS, form=form if form != "scalars" else "mean_embedding")
        store.kl = form != "scalars"
        for key in store.known():
            found = store.read([key])
            tensors = [found] if isinstance(found, torch.Tensor) else [x for x in found if x is not None]
            out[form, key] = [x.tolist() for x in tensors]
    return out


def age(root: Path, names: list[str], days: float) -> None:
    for name in names:
        then = time.time() - 86_400 * days
        os.utime(root / "shards" / name, (then, then))


FORMS = st.sampled_from(["scalars", "mean_embedding", HIDDEN])
PUTS = st.lists(st.tuples(FORMS, st.lists(st.sampled_from("abcdef"), min_size=1, unique=True)), min_size=1, max_size=9)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PUTS, st.sampled_from([(1 << 30, 1 << 30), (1 << 30, 500), (700, 1 << 30)]))
def test_whatever_was_put_reads_the_same_afterwards(
    tmp_path_factory: pytest.TempPathFactory, puts: list, limits: tuple[int, int]
) -> None:
    """Overlapping answers in all forms; the same scalars for a key whose KL's part is kept, from wherever."""
    root = tmp_path_factory.mktemp("store")
    for i, (form, keys) in enumerate(puts):
        put(root, keys, form, seed=i)
    before, shards = everything(root), len(list((root / "shards").iterdir()))
    saved, (collecting.SMALL, collecting.LARGE) = (collecting.SMALL, collecting.LARGE), limits
    try:
        (first,) = collect(root)
        assert everything(root) == before
        (second,) = collect(root)
    finally:
        collecting.SMALL, collecting.LARGE = saved
    assert everything(root) == before
    assert first.written - first.merged == len(list((root / "shards").iterdir())) - shards
    assert second.superseded == 0
    if limits == (1 << 30, 1 << 30):
        rich = {key for form, key in before if form != "scalars"}
        forms = {form for form, keys in puts if form != "scalars" or set(keys) - rich}
        assert len(list((root / "shards").iterdir())) == len(forms) and second.merged == 0


def test_scalars_go_where_the_kl_is_known(tmp_path: Path) -> None:
    put(tmp_path, ["a", "b"], "scalars")
    put(tmp_path, ["c"], "scalars")
    put(tmp_path, ["a", "b"], "mean_embedding")
    (dry,) = collect(tmp_path, dry_run=True)
    assert len(list((tmp_path / "shards").iterdir())) == 3
    (done,) = collect(tmp_path)
    assert (done.superseded, done.merged, done.written) == (dry.superseded, dry.merged, dry.written) == (2, 2, 1)
    assert done.freed > 0 and not (tmp_path / "dropped").exists()
    store = ReferenceStore(tmp_path, FIELDS)
    assert store.missing(["a", "b"], kl=True) == [] and store.missing(["a", "b", "c"], kl=False) == []


def test_what_was_not_used_goes(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name, fields in (("one", FIELDS), ("two", {"reference": "other"})):
        for i in range(3):
            put(store / name, [f"{i}"], "mean_embedding", seed=i, fields=fields)
    shards = {name: sorted(p.name for p in (store / name / "shards").iterdir()) for name in ("one", "two")}
    age(store / "one", shards["one"][:2], days=10)
    age(store / "two", shards["two"], days=10)
    os.utime(store / "two" / "manifest.json", (0, 0))
    # opening reads no shard, using one does
    reader = ReferenceStore(store / "one", FIELDS)
    used = next(k for k in "012" if reader._index.find(k, ("mean_embedding",)).shard == shards["one"][0])  # type: ignore[union-attr]
    assert reader.missing([used], kl=True) == []
    held = collect(store, keep_days=3)
    assert [c.held for c in held] == [1, 0] and held[0].dropped == 0
    assert len(list((store / "one" / "shards").iterdir())) == 3 and not (store / "two").exists()
    reader.holder.release()
    (one,) = collect(store, keep_days=3)
    assert one.dropped == 1
    assert ReferenceStore(store / "one", FIELDS).missing([used], kl=True) == []
    assert len(ReferenceStore(store / "one", FIELDS)) == 2


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    names = [put(tmp_path, [f"{i}"], "mean_embedding", seed=i) for i in range(5)]
    for i, name in enumerate(names):
        age(tmp_path, [name], days=5 - i)
    sizes = [(tmp_path / "shards" / name).stat().st_size for name in names]
    limit = sum(sizes[3:])
    (dry,) = collect(tmp_path, max_bytes=limit, dry_run=True)
    (done,) = collect(tmp_path, max_bytes=limit)
    assert dry.dropped == done.dropped == 3
    assert ReferenceStore(tmp_path, FIELDS).known(kl=True) == ["3", "4"]


def test_leftovers_and_damage(tmp_path: Path) -> None:
    names = [put(tmp_path, [f"{i}"], "mean_embedding", seed=i) for i in range(4)]
    shards = tmp_path / "shards"
    old, new = shards / f".{names[0]}.abc.tmp", shards / f".{names[1]}.def.tmp"
    for path in (old, new):
        path.write_bytes(b"half a shard")
    os.utime(old, (0, 0))
    whole = (shards / names[0]).read_bytes()
    (shards / names[0]).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (shards / names[1]).write_bytes(b"\xff" * 40)
    (done,) = collect(tmp_path)
    assert done.leftovers == 1 and not old.exists() and new.exists()
    store = ReferenceStore(tmp_path, FIELDS)
    assert store.known(kl=True) == ["2", "3"] == [k for k in "0123" if k not in store.missing(list("0123"), kl=True)]


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    names = [put(store / "one", [f"{i}", f"x{i}"], f, seed=i) for i, f in enumerate(["scalars", "mean_embedding"])]
    put(store / "two", ["q"], HIDDEN, fields={"reference": "other"})
    assert main(["reference", "ls", str(store)]) == 0
    said = capsys.readouterr().out
    for words in (
        "one  ",
        "reference        abc",
        "family           tiny",
        "mean_embedding   2 answers",
        "2 references, 3",
    ):
        assert words in said, words
    assert "hidden.bfloat16  1 answers" in said and "last used just now" in said
    assert main(["reference", "verify", str(store)]) == 0
    assert "3 shards" in capsys.readouterr().out
    damaged = store / "one" / "shards" / names[0]
    data = bytearray(damaged.read_bytes())
    data[random.Random(1).randrange(len(data))] ^= 4
    damaged.write_bytes(data)
    assert main(["reference", "verify", str(store)]) == 2
    out, err = capsys.readouterr()
    assert str(damaged) in out and "1 of 3 shards are damaged" in err and "Traceback" not in err
    assert damaged.exists()  # verifying changes nothing
    assert main(["reference", "gc", str(store), "--dry-run"]) == 0
    assert "would be freed" in capsys.readouterr().out
    assert main(["reference", "gc", str(store / "two"), "--keep", "0"]) == 0
    assert "1 shards dropped" in capsys.readouterr().out and not (store / "two").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ls", "nowhere"], "nowhere: is not a folder"),
        (["verify", "."], "holds no reference statistics"),
        (["gc", ".", "--keep", "-1"], "--keep must be a number of at least 0"),
        (["gc", ".", "--max-gib", "nan"], "--max-gib must be"),
        (["gc"], "required: store"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reference", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
