"""What a user can get wrong: one sentence with the file and the field, exit code 2, nothing lost."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tempo_fast.cli import main
from tempo_fast.files import read_json, read_jsonl, write_jsonl
from tempo_fast.schema import PreferenceRecord, Rejected

RECIPE = """
output_dir: {out}
model: {{path: {model}, dtype: float32, device: cpu}}
data: {{videos: {videos}}}
video: {{backend: pyav, fps: 4, max_pixels: 4704}}
pairs: {{clip_input: frames, aggregate: template, r: [4]}}
train:
  stages: [{{r: 4}}]
  learning_rate: 1e-3
  gradient_checkpointing: false
  max_tokens: 4096
"""


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small real videos."""
    from tempo_fast.tinyworld.generate import generate_world

    out = tmp_path_factory.mktemp("films")
    generate_world(out, seed=5, n_train=4, n_heldout=0)
    return out / "videos"


@pytest.fixture
def recipe(tmp_path: Path, tiny_path: str, films: Path):
    def write(videos: Path | str = films, out: Path | None = None) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(out=out or tmp_path / "run", model=tiny_path, videos=videos))
        return str(path)

    return write


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    """Exit code 2 and one sentence on stderr, which is returned."""
    code = main(list(words))
    err = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert "Traceback" not in "\n".join(err)
    said = [line for line in err if line.startswith("tempo-fast: ")]
    assert len(said) == 1 and err[-1] == said[0]
    return said[0]


def damaged(folder: Path, good: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video")
    (folder / "cut.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])


def test_no_such_folder(recipe, capsys) -> None:
    assert "/nowhere" in refused(capsys, "run", recipe("/nowhere"))


def test_empty_folder(recipe, capsys, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert str(tmp_path / "none") in refused(capsys, "run", recipe(tmp_path / "none"))


def test_nothing_usable(recipe, capsys, tmp_path: Path, films: Path) -> None:
    damaged(tmp_path / "bad", next(films.glob("*.mp4")))
    said = refused(capsys, "run", recipe(tmp_path / "bad"))
    assert "data.videos: none of 3 videos is usable" in said and "cut.mp4" in said


def test_bad_ones_among_good_ones(recipe, capsys, tmp_path: Path, films: Path) -> None:
    shutil.copytree(films, tmp_path / "mixed")
    damaged(tmp_path / "mixed", next(films.glob("*.mp4")))
    assert main(["curate", recipe(tmp_path / "mixed")]) == 0
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["counts"]["usable"] == 4 and summary["counts"]["quarantined"] == 3
    by_name = {Path(q["video"]).name: q["reason"] for q in summary["quarantined"]}
    assert set(by_name) == {"empty.mp4", "text.mp4", "cut.mp4"} and all(by_name.values())
    assert sorted(Path(r["video"]).name for _, r in read_jsonl(tmp_path / "run/curate/quarantine.jsonl")) == sorted(
        by_name
    )


def test_video_of_one_shot(recipe, capsys, tmp_path: Path) -> None:
    import av
    import numpy as np

    (tmp_path / "one").mkdir()
    with av.open(str(tmp_path / "one" / "shot.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        for _ in range(36):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    said = refused(capsys, "curate", recipe(tmp_path / "one"))
    assert "shot.mp4" in said and "1 shot" in said


def write_pairs(run: Path, film: Path, **changes) -> Path:
    record = PreferenceRecord("a", str(film), "Describe.", "A b.", [Rejected("B a.", "reverse", 4)], 4)
    write_jsonl(run / "pairs" / "r4.jsonl", [vars(record) | {"rejected": [vars(record.rejected[0])]} | changes])
    return run / "pairs" / "r4.jsonl"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chosen": None}, "r4.jsonl:1: field 'chosen' is empty"),
        ({"rejected": []}, "r4.jsonl:1: field 'rejected' is empty"),
        ({"chosen": " "}, "record a: answer 0 is empty (a response of zero tokens)"),
        ({"rejected": [{"text": "", "kind": "drop", "r": 4}]}, "record a: answer 1 is empty"),
        ({"video": "/gone.mp4"}, "/gone.mp4"),
    ],
)
def test_bad_records(recipe, capsys, tmp_path: Path, films: Path, changes: dict, words: str) -> None:
    write_pairs(tmp_path / "run", next(films.glob("*.mp4")), **changes)
    assert words in refused(capsys, "train", recipe())


def test_no_record_and_no_file(recipe, capsys, tmp_path: Path) -> None:
    assert "r4.jsonl: not there yet; run the step 'pairs' first" in refused(capsys, "train", recipe())
    (tmp_path / "run" / "pairs").mkdir()
    (tmp_path / "run" / "pairs" / "r4.jsonl").write_text("")
    assert "r4.jsonl: holds no record" in refused(capsys, "train", recipe())


def test_too_long_a_record(recipe, capsys, tmp_path: Path, films: Path) -> None:
    write_pairs(tmp_path / "run", next(films.glob("*.mp4")))
    said = refused(capsys, "train", recipe(), "--train.max_tokens", "50")
    assert "record a" in said and "50" in said


def test_read_only_output(recipe, capsys) -> None:
    assert "/proc/run" in refused(capsys, "curate", recipe(out=Path("/proc/run")))


def test_output_below_a_file(recipe, capsys, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(capsys, "curate", recipe(out=tmp_path / "file" / "run"))


def test_result_of_another_config_is_kept(recipe, capsys, tmp_path: Path, films: Path) -> None:
    write_pairs(tmp_path / "run", next(films.glob("*.mp4")))
    assert main(["train", recipe()]) == 0
    adapter = tmp_path / "run/train/stage1_r4/adapter/adapter_model.safetensors"
    before = adapter.read_bytes()
    said = refused(capsys, "train", recipe(), "--train.learning_rate", "2e-3")
    assert "another configuration: stage.learning_rate is 0.002 now and was 0.001" in said
    assert adapter.read_bytes() == before
    assert main(["train", recipe()]) == 0


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(recipe, capsys, tmp_path: Path, films: Path, small_disk: Path) -> None:
    write_pairs(small_disk / "run", next(films.glob("*.mp4")))
    said = refused(capsys, "train", recipe(out=small_disk / "run"), "--reference.store", str(tmp_path / "store"))
    assert str(small_disk) in said and "No space left" in said
    # with room, the same command goes on
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    words = ["train", recipe(out=small_disk / "run"), "--reference.store", str(tmp_path / "store")]
    assert main(words) == 0
    assert os.path.exists(small_disk / "run/train/stage1_r4/stage.json")


def test_a_failed_step_does_not_count_as_done(recipe, capsys, tmp_path: Path) -> None:
    clips = tmp_path / "run" / "curate" / "clips.jsonl"
    assert main(["curate", recipe()]) == 0
    whole = clips.read_bytes()
    refused(capsys, "curate", recipe(), "--curate.min_clips", "99")
    assert main(["curate", recipe()]) == 0
    assert clips.read_bytes() == whole
    clips.unlink()
    assert main(["curate", recipe()]) == 0
    assert clips.read_bytes() == whole


def test_own_pairs_are_not_overwritten(recipe, capsys, tmp_path: Path, films: Path) -> None:
    path = write_pairs(tmp_path / "run", next(films.glob("*.mp4")))
    mine = path.read_bytes()
    assert "r4.jsonl: was not made by this step" in refused(capsys, "run", recipe())
    assert path.read_bytes() == mine


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model.path", "/nope"), "model.path: /nope"),
        (("--data.eval_truth", "/nope.jsonl"), "/nope.jsonl: cannot be read"),
        (("--data.sft", "/nope.jsonl"), "/nope.jsonl: cannot be read"),
        (("--train.objective", "{name: kto, options: {}}"), "train.objective.name: kto needs kl_logratio"),
        (("--eval.bootstrap", "0"), "eval.bootstrap"),
        (("--model.device", "gpu"), "model.device"),
        (("--train.keep_checkpoints", "0"), "train.keep_checkpoints"),
    ],
)
def test_known_wrong_before_any_work(recipe, capsys, tmp_path: Path, flags: tuple[str, str], words: str) -> None:
    assert words in refused(capsys, "run", recipe(), *flags)
    assert not (tmp_path / "run" / "curate").exists()


def test_wrong_answer_of_a_question(recipe, capsys, tmp_path: Path) -> None:
    row = {"id": "q", "video": "v.mp4", "question": "What?", "options": ["a", "b"], "answer": 2}
    write_jsonl(tmp_path / "q.jsonl", [row])
    said = refused(capsys, "run", recipe(), "--data.eval_questions", str(tmp_path / "q.jsonl"))
    assert "question q: answer 2 is none of 2 options" in said
