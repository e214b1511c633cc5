"""Every recipe in docs/curriculum.md loads, and says what its sentence promises."""

import re
from pathlib import Path

from tempo_fast.configio import known_keys, load_config

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "curriculum.md").read_text()


def test_recipes_of_the_page_load(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    loaded = []
    for i, block in enumerate(blocks):
        path = tmp_path / f"{i}.yaml"
        path.write_text(block)
        loaded.append(load_config(str(path)).train)
    default, single, turned, mixed, by_kind, adaptive, between = loaded
    assert default.stages == load_config("tempo_fast").train.stages
    assert single.stages[0].rs == [16, 8, 4, 2] and turned.stages == default.stages[::-1]
    assert mixed.stages[0].mix == [1, 3] and mixed.stages[1].replay == 0.25
    assert by_kind.stages[1].objective.name == "ipo" and by_kind.stages[0].max_steps == 200
    assert adaptive.adaptive.every == 50 and between.sft.when == "interleaved"


def test_keys_of_the_page_exist() -> None:
    table = re.findall(r"^\| (`.*?) \|", PAGE, re.M)
    from tempo_fast.config import StageConfig

    named = {key for row in table for key in re.findall(r"`(\w+)`", row)}
    assert named == set(vars(StageConfig()))
    assert {"train.adaptive.max_records", "train.sft.when", "train.sft.ratio"} <= set(known_keys())
