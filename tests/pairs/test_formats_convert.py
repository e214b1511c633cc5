"""``tempo-fast pairs convert`` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.formats import content, quiet, random_records
from tempo_fast import cli
from tempo_fast.errors import InputError
from tempo_fast.pairs.convert import ConvertOptions, convert, convert_command
from tempo_fast.pairs.formats import FORMATS, iter_pairs, read_pairs, write_pairs

ROOT = Path(__file__).resolve().parents[2]
HOUND = {"prompt": "<video>\nWhat?", "video": "v.mp4", "chosen": "This.", "rejected": "That."}


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_from_and_to_every_format(tmp_path, capsys):
    source = tmp_path / "mine.jsonl"
    write_pairs(source, random_records(20))
    true, answers = content(random_records(20)), sum(len(x.rejected) for x in random_records(20))
    for fmt in FORMATS:
        out, back = tmp_path / f"{fmt}.json", tmp_path / "back.jsonl"
        assert cli.main(["pairs", "convert", str(source), str(out), "--to", fmt]) == 0
        assert cli.main(["pairs", "convert", str(out), str(back)]) == 0
        assert content(iter_pairs(back)) == true
        told = capsys.readouterr().out
        assert f"20 rows read, 20 records with {answers} rejected answers written, 0 skipped" in told
        rows = 20 if fmt == "native" else answers
        assert (
            f"{rows} rows read, 20 records with {answers} rejected answers written, 0 skipped (from {out} ({fmt}))"
            in told.replace(", 0 taken over with a remark", "")
        )
        assert ('"llama-factory": {' in told) == (fmt == "llama-factory")  # the entry of dataset_info.json


def test_bad_rows_are_listed_and_the_good_ones_survive(tmp_path, capsys):
    bad = [
        {**HOUND, "chosen": ""},
        "{",
        {k: v for k, v in HOUND.items() if k != "rejected"},
        {**HOUND, "video": ["a", "b"]},
    ]
    source = lines(tmp_path / "in.jsonl", HOUND, *bad * 8, {**HOUND, "rejected": "Else."})
    out, problems = tmp_path / "out.jsonl", tmp_path / "problems.jsonl"
    assert cli.main(["pairs", "convert", str(source), str(out), "--r", "4", "--problems", str(problems)]) == 0
    (got,) = read_pairs(out)
    assert [(x.text, x.r) for x in got.rejected] == [("That.", 4), ("Else.", 4)] and got.r == 4
    told = capsys.readouterr()
    assert "34 rows read, 1 records with 2 rejected answers written, 32 skipped" in told.out
    assert told.err.count(f"{source}:") == 20 and "and 12 more\n" in told.err
    assert f"{source}:2: field 'chosen' is empty\n" in told.err
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    assert [row["line"] for row in rows] == list(range(2, 34))
    assert [row["field"] for row in rows[:4]] == ["chosen", "", "rejected", "video"]
    assert rows[1]["reason"].startswith("not valid JSON") and set(rows[0]) == {
        "file",
        "line",
        "field",
        "reason",
        "kept",
    }
    # without problems the file is there too, and says so
    assert cli.main(["pairs", "convert", str(out), str(tmp_path / "again.jsonl"), "--problems", str(problems)]) == 0
    assert problems.read_text() == ""


def test_strict_and_nothing_good(tmp_path, capsys):
    out, problems = tmp_path / "out.jsonl", tmp_path / "problems.jsonl"
    out.write_text("as it was")
    source = lines(tmp_path / "in.jsonl", HOUND, {**HOUND, "chosen": 3})
    assert cli.main(["pairs", "convert", str(source), str(out), "--strict", "--problems", str(problems)]) == 2
    assert "1 problems, and --strict allows none" in capsys.readouterr().err
    assert out.read_text() == "as it was" and len(problems.read_text().splitlines()) == 1
    # what is written with a remark is one too
    lines(source, {**HOUND, "prompt": "In <video> what?"})
    assert cli.main(["pairs", "convert", str(source), str(out), "--strict"]) == 2
    lines(source, {**HOUND, "chosen": 3}, {**HOUND, "chosen": 4})
    assert cli.main(["pairs", "convert", str(source), str(out), "--problems", str(problems)]) == 2
    assert "none of 2 rows is good as llava-hound" in capsys.readouterr().err
    assert out.read_text() == "as it was" and len(problems.read_text().splitlines()) == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    with pytest.raises(InputError, match="unknown format"):
        convert(source, out, ConvertOptions(write_as="parquet"))
    for words in (["--to", "csv"], ["--from", "csv"], []):
        assert cli.main(["pairs", "convert", str(source), *([str(out)] if words else []), *words]) == 2


def test_what_a_target_cannot_say_is_remarked_on(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    write_pairs(source, random_records(40))
    assert cli.main(["pairs", "convert", str(source), str(tmp_path / "out.jsonl"), "--to", "ms-swift"]) == 0
    told = capsys.readouterr()
    assert "holds <video>, which readers of ms-swift take for a tag" in told.err and told.err.startswith("note: ")
    assert "taken over with a remark" in told.out
    assert read_pairs(tmp_path / "out.jsonl", problems=quiet) == list(random_records(40))


def test_a_file_may_become_itself(tmp_path):
    path = tmp_path / "x.jsonl"
    write_pairs(path, random_records(50))
    convert(path, path, ConvertOptions(write_as="trl"))
    convert(path, path)
    assert content(iter_pairs(path)) == content(random_records(50))


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out"])
def test_stopped_in_the_middle(tmp_path, stop, code, name):
    """A real process, its input a pipe that stays open when all good rows have been read."""
    os.mkfifo(tmp_path / "in.jsonl")
    read, write = tmp_path / "in.jsonl", tmp_path / "place" / name
    write.parent.mkdir()
    command = [sys.executable, "-m", "tempo_fast", "pairs", "convert", str(read), str(write), "--group", "adjacent"]
    problems = ["--problems", str(write.parent / "problems.jsonl")]
    process = subprocess.Popen([*command, *problems], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        with open(read, "wb") as pipe:
            for i in range(3000):
                pipe.write(json.dumps({**HOUND, "chosen": f"This {i}."}).encode() + b"\n")
            pipe.write(b"{\n")
            pipe.flush()
            assert process.stderr is not None
            assert ":3001: not valid JSON" in process.stderr.readline()
            process.send_signal(stop)
            said = process.communicate(timeout=60)[0], process.returncode
    finally:
        process.kill()
    assert said[1] == code
    assert list(write.parent.iterdir()) == []


def test_a_file_is_not_its_own_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"id": "x"}\n')
    for out, problems in (("a.jsonl", None), ("./a.jsonl", None), ("b.jsonl", "b.jsonl"), ("b.jsonl", "a.jsonl")):
        options = ConvertOptions(problems=Path(problems) if problems else None)
        with pytest.raises(InputError, match="are the same file"):
            convert_command("a.jsonl", out, options)
    with pytest.raises(InputError, match="--r must be 0 or more"):
        convert_command("a.jsonl", "b.jsonl", ConvertOptions(r=-3))
    assert Path("a.jsonl").read_text() == '{"id": "x"}\n'
