"""The commands as a shell sees them: exit codes, one sentence on stderr, what is printed."""

import json
import os
import subprocess
import sys

import pytest

from tempo_fast import __version__, cli
from tempo_fast.errors import InputError, Interrupted


@pytest.fixture
def pipeline(monkeypatch):
    """The real module with its two entries replaced; ``calls`` holds what was asked, ``error`` is raised."""
    import tempo_fast.pipeline as module

    class Fake:
        calls: list = []
        error: BaseException | None = None

    def record(*what):
        Fake.calls.append(what)
        if Fake.error:
            raise Fake.error
        return {"counts": {"videos": 3, "usable": 2, "pairs": 9, "records": 3}, "timings_s": {"total": 61.0}}

    Fake.calls, Fake.error = [], None
    monkeypatch.setattr(module, "run", lambda config, until=None: record("run", config, until))
    monkeypatch.setattr(module, "run_steps", lambda config, steps: record("steps", config, list(steps)))
    return Fake


def test_steps_are_called_with_the_config(pipeline, tmp_path, capsys):
    out = str(tmp_path / "o")
    assert cli.main(["run", "temple", "--until", "pairs", "--output_dir", out, "--seed=5"]) == 0
    assert cli.main(["--debug", "eval", "--seed", "6", "temple"]) == 0
    (run, config, until), (steps, other, names) = pipeline.calls
    assert (run, until, config.seed, config.output_dir) == ("run", "pairs", 5, out)
    assert (steps, names, other.seed) == ("steps", ["eval"], 6)
    printed = capsys.readouterr().out
    assert "videos 2 of 3 usable" in printed and "pairs 9 in 3 records" in printed and "1 min 01 s" in printed


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("data.videos: nothing there"), 2, "tempo-fast: data.videos: nothing there\n"),
        (Interrupted("ended; the same command resumes", 75), 75, "command resumes: tempo-fast run temple --seed 3\n"),
        (Interrupted("ended", 75, resumable=False), 75, "ended; nothing half-written is left, start it again\n"),
        (KeyboardInterrupt(), 130, "tempo-fast run temple --seed 3\n"),
    ],
)  # fmt: skip
def test_exit_codes_and_how_to_resume(pipeline, capsys, error, code, said):
    pipeline.error = error
    assert cli.main(["run", "temple", "--seed", "3"]) == code
    err = capsys.readouterr().err
    assert err.endswith(said) and err.count("\n") == 1
    assert cli.main(["run", "temple", "--seed", "3", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_our_own_bugs_are_not_dressed_up(pipeline):
    pipeline.error = ZeroDivisionError("oops")
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "temple"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["rnu"], "rnu: no such command; the nearest is run"),
        (["run"], "tempo-fast run needs a recipe"),
        (["run", "nowhere.yaml"], "nowhere.yaml: no such recipe file"),
        (["run", "temple", "rrpo"], "rrpo: unexpected word; the recipe is temple"),
        (["run", "temple", "--until", "lunch"], "--until: run alone takes it"),
        (["train", "temple", "--until", "pairs"], "--until: run alone takes it"),
        (["run", "temple", "--train.lr", "1"], "--train.lr is not a known key; the nearest is train.learning_rate"),
        (["merge", "here"], "tempo-fast merge: the following arguments are required: out"),
        (["scan", "/nonexistent/folder"], "/nonexistent/folder"),
        (["tinyworld", "x", "--train", "-1"], "tempo-fast tinyworld: --train and --heldout must not be negative"),
        (["doctor", "--all"], "tempo-fast doctor: unrecognized arguments: --all"),
    ],
)
def test_bad_commands_are_one_sentence_and_2(capsys, args, said):
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_help_lists_verbs_keys_and_the_recipes_values(capsys):
    assert cli.main([]) == 0 and cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    for verb in (
        "run",
        "curate",
        "pairs",
        "reference",
        "train",
        "merge",
        "eval",
        "report",
        "scan",
        "doctor",
        "tinyworld",
    ):
        assert f"\n  {verb} " in overview
    assert cli.main(["run", "rrpo", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--train.learning_rate FLOAT  [5e-06]" in text and "Peak of each stage." in text and "alpha: 0.01" in text
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"tempo-fast {__version__}\n"


def test_merge_without_an_adapter(tmp_path, capsys):
    assert cli.main(["merge", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "adapter_config.json: cannot be read" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text("{}")
    assert cli.main(["merge", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "base_model_name_or_path is empty" in capsys.readouterr().err
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    assert cli.main(["merge", str(tmp_path), str(full), "--base", "tinyworld"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err and (full / "mine.txt").read_text() == "keep"


def test_scan_tells_good_from_bad(tmp_path, capsys):
    av = pytest.importorskip("av")
    import numpy as np

    folder = tmp_path / "videos"
    folder.mkdir()
    with av.open(str(folder / "good.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(25):
            frame = np.full((64, 96, 3), i * 9, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    whole = (folder / "good.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    out = tmp_path / "scan.jsonl"
    assert cli.main(["scan", str(folder), "--json", str(out)]) == 0
    rows = {os.path.basename(row["video"]): row for row in map(json.loads, out.read_text().splitlines())}
    assert {name: row["ok"] for name, row in rows.items()} == {"good.mp4": True, "cut.mp4": False, "empty.mp4": False}
    good = rows["good.mp4"]
    assert (good["frames"], good["width"], good["height"], good["codec"]) == (25, 96, 64, "h264")
    assert good["tokens"] == good["sampled_frames"] // 2 * good["resized"][0] * good["resized"][1] // 784
    assert all(rows[name]["reason"] for name in ("cut.mp4", "empty.mp4"))
    printed = capsys.readouterr().out
    assert "1 of 3 videos can be read" in printed and "96x64" in printed and rows["empty.mp4"]["reason"] in printed
    assert cli.main(["scan", str(folder), "--json", str(out), "--recipe", "tinyworld", "--video.fps", "8"]) == 0
    rows = {os.path.basename(row["video"]): row for row in map(json.loads, out.read_text().splitlines())}
    assert rows["good.mp4"]["sampled_frames"] > good["sampled_frames"]
    assert "tokens of qwen2_vl at 8 fps" in capsys.readouterr().out


def test_scan_counts_as_the_model_of_the_recipe(successor, tmp_path, capsys):
    av = pytest.importorskip("av")
    import numpy as np

    folder = tmp_path / "videos"
    folder.mkdir()
    with av.open(str(folder / "v.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "bgr0"
        for i in range(20):
            frame = np.full((64, 96, 3), i * 9, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}/out\nmodel: {{path: {successor.path}}}\nvideo: {{fps: 2}}\n")
    out = tmp_path / "scan.jsonl"
    assert cli.main(["scan", str(folder), "--json", str(out), "--recipe", str(recipe)]) == 0
    row = json.loads(out.read_text())
    factor = successor.geometry.factor
    sides = {28: (56, 84), 32: (64, 96)}[factor]
    assert row["resized"] == list(sides[::-1]) and row["tokens"] == 2 * sides[0] * sides[1] // factor**2
    assert f"tokens of {successor.family.name} at 2 fps" in capsys.readouterr().out


def test_doctor_says_what_is_missing_for_what(capsys, monkeypatch):
    from importlib import util

    real = util.find_spec
    hidden = {"deepspeed", "vllm", "flash_attn"}
    monkeypatch.setattr(util, "find_spec", lambda name, *a: None if name in hidden else real(name, *a))
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("tempo-fast", "python", "torch", "pyav", "dali-gpu", "ffmpeg"):
        assert word in out
    assert "missing, for train.engine deepspeed" in out and "missing, for generation.engine vllm" in out


def test_as_a_process(tmp_path):
    def call(*args):
        return subprocess.run([sys.executable, "-m", "tempo_fast", *args], capture_output=True, text=True, cwd=tmp_path)

    bad = call("run", "tempel")
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1 and "Traceback" not in bad.stderr
    assert call("--version").stdout == f"tempo-fast {__version__}\n"
