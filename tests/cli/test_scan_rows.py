"""The file of rows: only what a scan wrote is ever changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from counter_clips import write_counter
from hypothesis import given
from hypothesis import strategies as st

from tempo_fast import cli
from tempo_fast.errors import InputError
from tempo_fast.scan.rows import RowFile

OTHERS = {
    "list.txt": b"v/a.mp4\nv/b.mp4\n",
    "one_line.txt": b"v/a.mp4",
    "notes.md": "schön\n\nwords".encode(),
    "mine.jsonl": b'{"video": "a.mp4", "prompt": "mine"}\n',
    "unended.jsonl": b'{"video": "a.mp4", "prompt": "mine"}',
    "torn.jsonl": b'{"video": "a.mp4", "prompt": "mi',
    "table.json": b'[{"video": "a.mp4", "ok": true, "settings": ""}]\n',
    "numbers.jsonl": b"1\n2\n",
    "nothing.jsonl": b"null\n{}\n",
    "mixed.jsonl": b'{"video": "a.mp4", "ok": true, "settings": ""}\nand words\n',
    "words_last.jsonl": b'{"video": "a.mp4", "ok": true, "settings": ""}\nand words',
    "film.mp4": bytes(range(256)) * 9,
    "zeros.bin": bytes(100),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("videos")
    write_counter(out / "a.mp4", 20)
    return out


def scan(*words: object) -> int:
    return cli.main(["scan", "--workers", "1", "--no-decode", *map(str, words)])


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_what_no_scan_wrote_is_left_alone(name, fresh, tmp_path):
    path = tmp_path / name
    path.write_bytes(OTHERS[name])
    with pytest.raises(InputError, match=f"{name}: .* was not written by a scan and would be overwritten"):
        RowFile(path, fresh=fresh)
    assert path.read_bytes() == OTHERS[name]


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_out_is_none_of_the_files_to_scan(fresh, videos, tmp_path, capsys):
    mine = tmp_path / "list.txt"
    mine.write_text(f"{videos}/a.mp4\n{tmp_path}/later.mp4\n")
    before = mine.read_bytes(), (videos / "a.mp4").read_bytes()
    for words in (
        [videos / "a.mp4", "--out", mine],
        [mine, "--out", mine],
        [mine, "--out", tmp_path / "." / "list.txt"],
        [mine, "--out", videos / "a.mp4"],
        [mine, "--out", tmp_path / "later.mp4"],
        [videos, "--out", videos / "a.mp4"],
    ):
        assert scan(*words, *fresh) == 2, words
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and str(words[-1]) in err
    assert (mine.read_bytes(), (videos / "a.mp4").read_bytes()) == before and not (tmp_path / "later.mp4").exists()


def test_out_and_the_list_of_copies_are_two_files(videos, tmp_path, capsys):
    fixed = tmp_path / "fixed"
    assert scan(videos, "--fix", fixed, "--out", fixed / "videos.txt") == 2
    mine = fixed / "videos.txt"
    assert f"{mine} is one of" in capsys.readouterr().err and not mine.exists()
    mine.write_text(f"{videos}/a.mp4\n")
    assert scan(mine, "--fix", fixed) == 2
    assert f"{mine} is one of" in capsys.readouterr().err and mine.read_text() == f"{videos}/a.mp4\n"


def test_out_is_a_plain_file(videos, tmp_path, capsys):
    """A device would be replaced by a file of its name."""
    link = tmp_path / "null"
    os.mknod(link, 0o600 | 0o020000, os.makedev(1, 3)) if os.geteuid() == 0 else link.mkdir()
    assert scan(videos, "--out", link) == 2
    assert f"{link}: " in capsys.readouterr().err and not link.is_file()


ROW = {"video": "vidéo \"1\".mp4", "ok": True, "reason": "", "settings": "x", "frames": 12}
LINE = json.dumps(ROW, ensure_ascii=False).encode() + b"\n"


@given(whole=st.integers(0, 3), torn=st.integers(0, len(LINE) - 1))
def test_a_line_cut_anywhere_by_a_kill_is_taken_off(whole, torn, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "r.jsonl"
    path.write_bytes(LINE * whole + LINE[:torn])
    rows = RowFile(path)
    assert rows.get(ROW["video"]) == (ROW if whole else None)
    other = {**ROW, "video": "b.mp4"}
    rows.append(other)
    rows.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [ROW] * whole + [other]
