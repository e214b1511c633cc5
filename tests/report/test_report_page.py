"""The page from a whole run, and from what is there when parts are missing."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tempo_fast.config import RunConfig
from tempo_fast.report import build_report
from tempo_fast.report.load import load_run
from tempo_fast.report.strips import choose_records, mark
from tempo_fast.report.text import describe_result, duration, interval, number
from tempo_fast.schema import PreferenceRecord, Rejected

VOID = {"meta"}


class Balanced(HTMLParser):
    """Every opened element is closed, in order; collects text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "data", "srcset"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def parse(path: Path) -> Balanced:
    page = Balanced()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def test_page_is_complete_and_asks_nothing_of_the_network(finished_run):
    root, config = finished_run
    path = build_report(root, config)
    html, page = path.read_text(), parse(path)
    assert path == root / "report.html"
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert set(re.findall(r"url\((.{10})", html)) == {"data:image"}
    assert "<script" not in html and "@import" not in html and not re.search(r"https?://", html)
    text = " ".join(page.text)
    for word in (
        "after r=16",
        "after r=2",
        "stages + SFT",
        "SFT alone",
        "order yes no",
        "broken_<one>.mp4",
        "1 shot, fewer than 4",
    ):
        assert word in text, word
    assert "No pictures" not in text and "Not measured" not in text


def test_every_figure_of_the_evaluation_is_on_the_page(finished_run):
    root, config = finished_run
    text = "".join(parse(build_report(root, config)).text)
    for row in json.loads((root / "eval" / "eval.json").read_text())["rows"]:
        stats = [row["pairwise_all"], *row["questions"].values(), *row["captions"].values()]
        stats += [s for per in row["pairwise"].values() for s in per.values()]
        for s in stats:
            assert f"{s['value']:.2f}" in text
        assert f"{row['questions']['all']['lo']:.2f}–{row['questions']['all']['hi']:.2f}" in text


def test_strips_show_clips_in_the_rejected_order(finished_run):
    root, config = finished_run
    html = build_report(root, config).read_text()
    record = choose_records(load_run(root).records[16], 1, 0)[0]
    for x in record.rejected:
        strip = html[html.index(f'<div class="strip {x.kind}">') :]
        shown = [int(n) - 1 for n in re.findall(r"<b>(\d+)</b>", strip[: strip.index("</ol>")])]
        assert shown == x.order


@pytest.mark.parametrize("missing", ["summary.json", "pairs", "curate", "train", "eval", "config.yaml", "world"])
def test_a_missing_part_is_named_and_the_rest_is_there(finished_run, tmp_path, missing):
    root, config = finished_run
    run = tmp_path / "run"
    shutil.copytree(root, run)
    if missing == "eval":  # the summary repeats the rows
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps({**summary, "eval": []}))
    if missing == "world":
        for video in load_run(run).clips:
            assert str(root) in video
        shutil.move(root / "world", tmp_path / "elsewhere")
    try:
        target = run / missing
        if missing != "world":
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        page = parse(build_report(run, config))
    finally:
        if missing == "world":
            shutil.move(tmp_path / "elsewhere", root / "world")
    text = " ".join(page.text)
    said = {
        "summary.json": "No timings yet",
        "pairs": "No pairs yet",
        "curate": "No pictures",
        "train": "No training metrics yet",
        "eval": "No evaluation yet",
        "config.yaml": "config.yaml is not there",
        "world": "No pictures",
    }
    assert said[missing] in text
    assert page.ids == ["results", "training", "strips", "audit", "work", "config"]


def test_an_empty_folder_and_broken_files_still_give_a_page(tmp_path):
    config = RunConfig(output_dir=str(tmp_path))
    parse(build_report(tmp_path, config))
    for name in (
        "summary.json",
        "eval/eval.json",
        "pairs/audit.json",
        "pairs/r4.jsonl",
        "train/stage1_r4/metrics.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"a": [1,')
    parse(build_report(tmp_path, config))


def test_null_and_missing_figures(finished_run, tmp_path):
    root, config = finished_run
    shutil.copytree(root, tmp_path / "run")
    path = tmp_path / "run" / "eval" / "eval.json"
    rows = json.loads(path.read_text())["rows"]
    empty = {"value": None, "lo": None, "hi": None, "n": 0, "items": 0}
    rows[1]["pairwise_all"], rows[2]["captions"], rows[3]["pairwise"]["drop"]["16"] = empty, {}, empty
    rows[0]["captions"]["order_tau"] = empty
    path.write_text(json.dumps({"rows": rows}))
    metrics = tmp_path / "run" / "train" / "stage2_r8" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        del line["kl/chosen"]
        line["loss"] = float("nan") if line["step"] == 3 else line["loss"]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = " ".join(parse(build_report(tmp_path / "run", config)).text)
    assert "–" in text and "nan" not in text


def test_text_from_a_model_cannot_become_markup(finished_run, tmp_path):
    root, config = finished_run
    shutil.copytree(root, tmp_path / "run")
    path = tmp_path / "run" / "pairs" / "r16.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["chosen"], row["prompt"], row["spans"] = (
            "<script>alert(1)</script> & more",
            '"><img src=x>',
            [[0, 8], [4, 9], [900, 901]],
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = build_report(tmp_path / "run", config).read_text()
    assert "<script" not in html and "<img" not in html
    assert "<mark>&lt;script&gt;</mark>alert(1)&lt;/script&gt; &amp; more" in html


def test_marks_and_formats():
    assert mark("a < b", [[2, 3]]) == "a <mark>&lt;</mark> b"
    assert mark("abc", [[1, 2], [0, 1], [1, 3], [2, 9]]) == "<mark>a</mark><mark>b</mark>c"
    assert [duration(x) for x in (0.44, 12, 59.7, 200, 7500, None)] == [
        "0.4 s",
        "12 s",
        "1 min 00 s",
        "3 min 20 s",
        "2 h 05 min",
        "–",
    ]
    assert [number(x) for x in (1, 0.12345, 2e-6, float("nan"), None, True)] == [
        "1",
        "0.123",
        "2.00e-06",
        "–",
        "–",
        "–",
    ]
    assert interval({"value": 0.5, "lo": 0.25, "hi": 0.754}) == "0.50 [0.25, 0.75]"


def test_records_are_chosen_until_every_kind_was_shown():
    def record(name: str, *kinds: str) -> PreferenceRecord:
        return PreferenceRecord(name, "v.mp4", "p", "c", [Rejected("x", k, 4) for k in kinds], 4)

    records = [
        record("a", "drop"),
        record("b", "drop", "shuffle"),
        record("c", "reverse"),
        record("d", "shuffle", "drop"),
    ]
    assert [x.id for x in choose_records(records, 1)] == ["b", "c"]
    assert [x.id for x in choose_records(records, 1, 1)] == ["d", "c"]
    assert [x.id for x in choose_records(records, 2)] == ["b", "d", "c"]
    assert choose_records([], 3) == []


def test_terminal_summary_has_the_figures(finished_run):
    root, _ = finished_run
    summary = json.loads((root / "summary.json").read_text())
    text = describe_result("run", root, summary)
    for stage in summary["stages"]:
        assert stage["name"] in text and f"{stage['accuracy']:.3f}" in text
    assert interval(summary["eval"][0]["pairwise_all"]) in text and "5 min 45 s" in text
    assert describe_result("curate", root, {}).startswith("videos 0 of 0")
