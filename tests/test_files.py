"""Files are complete or absent; digests are of content alone."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_fast.errors import InputError
from tempo_fast.files import digest, drop_stale, file_digest, new_folder, read_json, write_atomic, write_json

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values))
def test_digest_ignores_key_order(value: dict) -> None:
    assert digest(value) == digest(dict(reversed(list(value.items()))))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def fail(f) -> None:
        f.write(b"half")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError):
        write_atomic(path, fail)
    assert read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_unwritable_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_json(tmp_path / "file" / "x.json", {})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_disk_is_one_sentence(tmp_path: Path) -> None:
    import errno

    def full(f) -> None:
        with open("/dev/full", "wb") as device:
            device.write(b"x")
            device.flush()

    with pytest.raises(InputError, match=os.strerror(errno.ENOSPC)):
        write_atomic(tmp_path / "x", full)
    assert not (tmp_path / "x").exists()


def test_missing_file_digest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        file_digest(tmp_path / "none")


def test_new_folder_takes_the_place_of_the_old(tmp_path: Path) -> None:
    for text in "ab":
        with new_folder(tmp_path / "x") as tmp:
            (tmp / "f").write_text(text)
    assert (tmp_path / "x" / "f").read_text() == "b"
    assert os.listdir(tmp_path) == ["x"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    with new_folder(tmp_path / "x") as tmp:
        (tmp / "f").write_text("a")
    with pytest.raises(InputError, match="x: cannot be written .No space left"), new_folder(tmp_path / "x") as tmp:
        (tmp / "f").write_text("b")
        raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3: file write failed")
    assert (tmp_path / "x" / "f").read_text() == "a"
    assert os.listdir(tmp_path) == ["x"]


def test_what_killed_processes_left_goes_when_it_is_old(tmp_path: Path) -> None:
    for name in (".old.tmp", ".new.tmp", "kept.tmp", ".work-old/a/b", ".work-new/a", ".other/a"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for name in (".old.tmp", "kept.tmp", ".work-old", ".other"):
        os.utime(tmp_path / name, (1, 1))
    drop_stale(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".new.tmp", ".other", ".work-new", ".work-old", "kept.tmp"]
    drop_stale(tmp_path, ".work-*")
    assert sorted(os.listdir(tmp_path)) == [".new.tmp", ".other", ".work-new", "kept.tmp"]
    drop_stale(tmp_path / "nowhere")
