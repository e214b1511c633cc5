"""The page of pairs: what is drawn, what it shows of it, and what is left when videos or files are missing."""

from __future__ import annotations

import json
import random
import re
import shutil
import tracemalloc
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.config import RunConfig
from tempo_fast.files import read_json, write_json, write_jsonl
from tempo_fast.pairs.judge import measures
from tempo_fast.pairs.spans import differing_spans
from tempo_fast.report.pairs_page import build_pairs_page, draw_pairs
from tempo_fast.schema import Clips, PreferenceRecord, Rejected, read_records
from tempo_fast.stats import share_interval

RS = (16, 8, 4, 2)


class Page(HTMLParser):
    """Every opened element is closed, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def cards(self) -> list[str]:
        return self.html.split("<article class='record'>")[1:]


@pytest.fixture(scope="module")
def run(finished_run: tuple[Path, RunConfig], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    """A run's folder whose records carry spans, and whose audit what the judge says of them."""
    root, config = finished_run
    out = tmp_path_factory.mktemp("pairs") / "run"
    shutil.copytree(root, out)
    audit = read_json(out / "pairs" / "audit.json")
    for r in RS:
        records = read_records(out / "pairs" / f"r{r}.jsonl", PreferenceRecord)
        for record in records:
            for x in record.rejected:
                x.chosen_spans, x.spans = differing_spans(record.chosen, x.text)
        write_jsonl(out / "pairs" / f"r{r}.jsonl", records)
        for kind, row in audit["stats"][str(r)].items():
            found = [measures(x.chosen, y.text) for x in records for y in x.rejected if y.kind == kind]
            row["steps"] = sum(m["steps"] for m in found) / len(found)
            row["separated"] = share_interval(sum(m["separated"] > 0 for m in found), len(found))
    audit["failed"] = [{"video": "a/<b>.mp4", "reason": "cannot be decoded"}]
    write_json(out / "pairs" / "audit.json", audit)
    return out, config


def copy(run: tuple[Path, RunConfig], to: Path) -> Path:
    shutil.copytree(run[0], to / "run")
    return to / "run"


def test_a_page_that_asks_nothing_of_the_network(run: tuple[Path, RunConfig]) -> None:
    path = build_pairs_page(run[0] / "pairs", run[1])
    page = Page(path)
    assert path == run[0] / "pairs" / "audit.html"
    assert page.links == ["#figures", "#r16", "#r8", "#r4", "#r2"]
    assert set(re.findall(r"url\((.{10})", page.html)) == {"data:image"}
    assert "<script" not in page.html and "@import" not in page.html and not re.search(r"https?://", page.html)
    text = " ".join(page.text)
    assert "<b>.mp4: cannot be decoded" in text and "No pictures" not in text
    # 4 videos with 3 pairs each at every r: fewer than asked for, hence all of them
    assert len(page.cards) == 4 * 4 * 3
    assert page.html == Page(build_pairs_page(run[0] / "pairs", run[1])).html


def test_the_audits_figures_are_on_it(run: tuple[Path, RunConfig]) -> None:
    page = Page(build_pairs_page(run[0] / "pairs", run[1]))
    text = " ".join(page.text)
    for per in read_json(run[0] / "pairs" / "audit.json")["stats"].values():
        for row in per.values():
            s = row["separated"]
            assert f"{s['value']:.2f} [{s['lo']:.2f}, {s['hi']:.2f}]" in text
    assert "2 identity, 1 length ratio" in text and "are the same perturbation for 1 of 4 videos" in text
    assert page.html.count("<figure>") == 3  # a chart per kind


def places(strip: str) -> list[int]:
    return [int(n) - 1 for n in re.findall(r"<b>(\d+)</b>", strip)]


def test_a_card_shows_both_orders_both_texts_and_what_the_judge_says(run: tuple[Path, RunConfig]) -> None:
    root, config = run
    cards = Page(build_pairs_page(root / "pairs", config)).cards
    clips = {c.video: len(c.clips) for c in read_records(root / "curate" / "clips.jsonl", Clips)}
    shown = 0
    for r in RS:
        for record in read_records(root / "pairs" / f"r{r}.jsonl", PreferenceRecord):
            for x in record.rejected:
                mine = [c for c in cards if f">{record.id}<" in c and f"class='strip {x.kind}'" in c]
                assert len(mine) == 1
                left, right = mine[0].split(f"<div class='strip {x.kind}'>")
                assert places(left) == list(range(clips[record.video])) and places(right) == x.order
                answers = re.findall(r"<p class='answer'>(.*?)</p>", mine[0])
                answers = [unescape(re.sub("<[^>]+>", "", a)) for a in answers]
                assert answers == [record.chosen, x.text]
                found = measures(record.chosen, x.text)
                assert (">told apart<" in mine[0]) == (found["separated"] > 0)
                assert f"steps in both <b>{found['steps']:.2f}" in mine[0]
                marked = re.findall(r"<mark>(.*?)</mark>", left)
                assert marked == [record.chosen[a:b] for a, b in x.chosen_spans]
                shown += 1
    assert shown == len(cards)


def test_blank_clips_are_black(run: tuple[Path, RunConfig], tmp_path: Path) -> None:
    out = copy(run, tmp_path)
    (record, *_) = read_records(out / "pairs" / "r16.jsonl", PreferenceRecord)
    n = len(record.rejected[-1].order)
    x = Rejected("Nothing.", "mask", 16, list(range(n)), blank=[i % 3 == 0 for i in range(n)])
    for path in (out / "pairs").glob("r*.jsonl"):
        path.unlink()
    write_jsonl(out / "pairs" / "r16.jsonl", [PreferenceRecord("a", record.video, "p", "c.", [x], 16)])
    (card,) = Page(build_pairs_page(out / "pairs", run[1])).cards
    assert card.count('class="blank"') == sum(x.blank)


@pytest.mark.parametrize("missing", ["curate", "world", "audit.json"])
def test_without_videos_or_audit_the_texts_are_there(run: tuple[Path, RunConfig], tmp_path: Path, missing: str) -> None:
    out = copy(run, tmp_path)
    if missing == "world":  # the curated clips name files that are gone
        rows = [json.loads(line) for line in (out / "curate" / "clips.jsonl").read_text().splitlines()]
        records = {r: read_records(out / "pairs" / f"r{r}.jsonl", PreferenceRecord) for r in RS}
        write_jsonl(out / "curate" / "clips.jsonl", [{**row, "video": row["video"] + ".gone"} for row in rows])
        for r, some in records.items():
            for record in some:
                record.video += ".gone"
            write_jsonl(out / "pairs" / f"r{r}.jsonl", some)
    elif missing == "curate":
        shutil.rmtree(out / "curate")
    else:
        (out / "pairs" / "audit.json").unlink()
    page = Page(build_pairs_page(out / "pairs", run[1]))
    text = " ".join(page.text)
    assert len(page.cards) == 48 and "told apart" in text
    assert ("url(" in page.html) == (missing == "audit.json")
    assert ("No pictures" in text) == (missing == "world")
    assert ("No audit" in text) == (missing == "audit.json")


def test_orders_of_something_else_than_clips_get_no_strip(run: tuple[Path, RunConfig], tmp_path: Path) -> None:
    """RRPO perturbs frames: 40 of them are not the 16 clips of the same video."""
    out = copy(run, tmp_path)
    (record, *_) = read_records(out / "pairs" / "r16.jsonl", PreferenceRecord)
    record.provenance["clips"] = 40
    write_jsonl(out / "pairs" / "r16.jsonl", [record])
    page = Page(build_pairs_page(out / "pairs", run[1]))
    assert all("<ol" not in card for card in page.cards if "/r16<" in card) and "url(" in page.html


def test_a_broken_row_is_named_and_those_before_it_are_shown(run: tuple[Path, RunConfig], tmp_path: Path) -> None:
    out = copy(run, tmp_path)
    path = out / "pairs" / "r8.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], '{"id": 3', *lines[2:]]))
    (out / "pairs" / "r4.jsonl").write_text("")
    (out / "pairs" / "audit.json").write_text("[1]")
    page = Page(build_pairs_page(out / "pairs", run[1]))
    text = " ".join(page.text)
    assert f"{path}:3: not valid JSON" in text and "No pairs" in text
    assert sum("/r8<" in card for card in page.cards) == 6


def test_figures_alone_where_no_pairs_are_asked_for(run: tuple[Path, RunConfig]) -> None:
    config = RunConfig(output_dir=str(run[0]))
    config.pairs.audit_pairs = 0
    page = Page(build_pairs_page(run[0] / "pairs", config))
    assert page.cards == [] and page.links == ["#figures"] and "told apart" in page.html


def test_text_from_a_model_cannot_become_markup(run: tuple[Path, RunConfig], tmp_path: Path) -> None:
    out = copy(run, tmp_path)
    bad = "<script>alert(1)</script> & more."
    x = Rejected('</p><img src="x">', "a'b><i", 2, [1, 0], spans=[[0, 4], [2, 9], [90, 99]], chosen_spans=[[0, 8]])
    record = PreferenceRecord("<b>", "v<u>.mp4", "'\"><img>", bad, [x], 2)
    write_jsonl(out / "pairs" / "r2.jsonl", [record])
    page = Page(build_pairs_page(out / "pairs", run[1]))
    assert "<script" not in page.html and "<img" not in page.html
    assert "<mark>&lt;script&gt;</mark>alert(1)&lt;/script&gt; &amp; more." in page.html


# -- the draw ---------------------------------------------------------------------------------------------------------


def records(videos: int, r: int, *, per_pair: bool = False) -> list[PreferenceRecord]:
    out = []
    for v in range(videos):
        rejected = [Rejected(f"{k} {v}.", k, r) for k in ("drop", "shuffle", "reverse")]
        for i, group in enumerate([[x] for x in rejected] if per_pair else [rejected]):
            known = {"video_digest": f"d{v}"} if v % 2 else {}
            out.append(PreferenceRecord(f"{v}/{i}", f"{v}.mp4", "p", "c.", group, r, provenance=known))
    return out


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.booleans(), st.integers(0, 99))
def test_the_draw_goes_by_content_alone(videos: int, most: int, per_pair: bool, seed: int) -> None:
    rows = records(videos, 16, per_pair=per_pair)
    drawn = draw_pairs(iter(rows), most, seed)
    random.Random(seed).shuffle(rows)
    again = draw_pairs(iter(rows), most, seed)
    assert [(a.video, x.kind) for a, x in drawn] == [(a.video, x.kind) for a, x in again]
    assert len(drawn) == min(most, 3 * videos)
    counts = {v: sum(a.video == v for a, _ in drawn) for v in {a.video for a, _ in drawn}}
    assert len(counts) == min(most, videos)  # as many videos as there are
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({(a.video, x.kind) for a, x in drawn}) == len(drawn)


def test_every_r_shows_the_same_videos_and_all_kinds_come_up() -> None:
    drawn = {r: draw_pairs(iter(records(500, r)), 24, 3) for r in RS}
    videos = [[a.video for a, _ in pairs] for pairs in drawn.values()]
    assert all(v == videos[0] for v in videos) and len(set(videos[0])) == 24
    assert videos[0] != [a.video for a, _ in draw_pairs(iter(records(500, 16)), 24, 4)]
    assert all({x.kind for _, x in pairs} == {"drop", "shuffle", "reverse"} for pairs in drawn.values())
    assert draw_pairs(iter(records(5, 2)), 0, 0) == []


def test_drawing_holds_no_more_than_what_is_drawn() -> None:
    def many(n: int) -> Iterator[PreferenceRecord]:
        for v in range(n):
            yield PreferenceRecord(str(v), f"{v}.mp4", "p", "x" * 20_000, [Rejected("y" * 20_000, "drop", 2)], 2)

    peaks = []
    for n in (200, 4000):
        tracemalloc.start()
        draw_pairs(many(n), 24, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 60e6
