"""Recipes and overrides: what comes out, and the one sentence for everything that is wrong with them."""

import dataclasses
import math

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tempo_fast import configio
from tempo_fast.config import RunConfig, StageConfig
from tempo_fast.configio import describe_keys, known_keys, load_config, nearest_key, save_config, shipped_recipes
from tempo_fast.errors import InputError


@pytest.fixture
def recipe(tmp_path):
    def write(text: str = "seed: 1\n"):
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_by_name(name):
    config = load_config(name)
    assert [s.r for s in config.train.stages] and set(s.r for s in config.train.stages) <= set(config.pairs.r)
    assert load_config(f"recipes/{name}.yaml") == config


def test_shipped_recipes_say_where_every_value_is_from():
    for name in shipped_recipes():
        lines = (configio.RECIPES / f"{name}.yaml").read_text().splitlines()
        for number, line in enumerate(lines, 1):
            key, _, value = line.split("#")[0].partition(":")
            above = "\n".join(lines[max(0, number - 6) : number])
            in_sourced_list = line.lstrip().startswith("- {") and "stages:  #" in above
            if key.strip() and value.strip():
                assert "#" in line or in_sourced_list, f"{name}.yaml:{number} gives no source"


def test_temple_is_what_its_authors_ran():
    c = load_config("temple")
    assert [(s.r, s.epochs) for s in c.train.stages] == [(16, 1), (8, 1), (4, 1), (2, 1)]
    assert c.train.objective.options == {"beta": 0.1, "sft_weight": 1.0, "label_smoothing": 0.0}
    assert (c.train.lora.r, c.train.lora.alpha, c.train.learning_rate, c.train.batch_size) == (32, 64, 5e-6, 16)
    assert (c.reference.mode, c.pairs.instruction, c.video.total_pixels) == ("previous_stage", "per_pair", 9_000_000)
    ours = load_config("tempo_fast")
    assert ours.train == c.train and (ours.reference.mode, ours.pairs.instruction) == ("base", "per_video")


def test_overrides_win_and_keep_the_rest(recipe):
    path = recipe("train:\n  learning_rate: 1e-4\n  stages:\n  - {r: 16, epochs: 3}\n  - {r: 2}\n")
    c = load_config(
        path, ["--train.learning_rate", "2E-5", "--train.stages.1.epochs=4", "--pairs.kinds", "[drop, reverse]"]
    )
    assert c.train.learning_rate == 2e-5
    assert [(s.r, s.epochs) for s in c.train.stages] == [(16, 3), (2, 4)]
    assert c.pairs.kinds == ["drop", "reverse"]
    assert load_config(path).train.learning_rate == 1e-4


def test_a_list_is_replaced_and_nothing_of_the_old_one_lives_on(recipe):
    path = recipe("train:\n  stages:\n  - {r: 16, epochs: 3, learning_rate: 1e-3}\n")
    stages = load_config(path, ["--train.stages", "[{r: 4}]"]).train.stages
    assert stages == [StageConfig(r=4)]


def test_options_of_an_objective(recipe):
    path = recipe("train:\n  objective: {name: rrpo, options: {beta: 0.5, alpha: 1e-2}}\n")
    assert load_config(path, ["--train.objective.options.alpha", "0.05"]).train.objective.options == {
        "beta": 0.5,
        "alpha": 0.05,
    }
    # without options in the recipe the entry joins the defaults
    assert load_config(recipe(), ["--train.objective.options.beta=0.3"]).train.objective.options == {
        "beta": 0.3,
        "sft_weight": 1.0,
    }


def test_text_stays_text(recipe):
    c = load_config(recipe(), ["--output_dir", "2024", "--model.path", "1e3", "--data.videos", "null"])
    assert (c.output_dir, c.model.path, c.data.videos) == ("2024", "1e3", "null")


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("train: {lr: 1}", [], "{path}: train.lr is not a known key; the nearest is train.learning_rate"),
        ("seeed: 1", [], "{path}: seeed is not a known key; the nearest is seed"),
        ("seed: 1", ["--vido.fps", "2"], "--vido.fps is not a known key; the nearest is video.fps"),
        ("seed: 1", ["--beta", "2"], "--beta is not a known key; the nearest is train.objective.options.beta"),
        ("train: {stages: [{r: 16, epoch: 2}]}", [], "{path}: train.stages.0.epoch is not a known key; the nearest is "
         "train.stages.0.epochs"),
        ("train: {learning_rate: fast}", [], "{path}: train.learning_rate must be a number, got fast"),
        ("seed: 1.5", [], "{path}: seed must be a whole number, got 1.5"),
        ("train: 3", [], "{path}: train is a section of keys, got 3"),
        ("train: {stages: 4}", [], "{path}: train.stages must be a list of mappings, got 4"),
        ("train: {stages: [{r: x}]}", [], "{path}: train.stages.r must be a whole number or a list of whole numbers, "
         "got x"),
        ("video: {backend: cv2}", [], "{path}: video.backend must be one of auto, pyav, torchcodec, dali-cpu, "
         "dali-gpu, got cv2"),
        ("seed: 1", ["--pairs.r", "[16, x]"], "--pairs.r must be a list of whole numbers, got x"),
        ("seed: 1", ["--seed"], "--seed: needs a value"),
        ("seed: 1", ["--train.trees", "--seed", "1"], "--train.trees: needs a value"),
        ("seed: 1", ["--sed"], "--sed is not a known key; the nearest is seed"),
        ("seed: 1", ["seed", "2"], "seed: unexpected word; overrides are written --key.sub value"),
        ("seed: 1", ["--train.stages.9.r", "2"], "--train.stages.9.r: there are only 4 entries"),
        ("seed: [1", [], "{path}:1: not valid YAML (expected ',' or ']', but got '<stream end>')"),
        ("", [], "{path}: expected a mapping of sections, got nothing"),
        ("- 1", [], "{path}: expected a mapping of sections, got [1]"),
        ("video: {fps: 0}", [], "config: video.fps must be above 0, got 0"),
        ("train: {objective: {name: dpoo}}", [], "config: train.objective: "),
        ("train: {objective: {options: {betta: 1}}}", [], "config: train.objective: "),
    ],
)  # fmt: skip
def test_one_sentence_for_what_is_wrong(recipe, text, options, said):
    path = recipe(text)
    with pytest.raises(InputError) as e:
        load_config(path, options)
    message = str(e.value)
    assert message.startswith(said.format(path=path)) and "\n" not in message


def test_missing_recipe_names_the_shipped_ones(tmp_path):
    with pytest.raises(InputError, match="tempel: no such recipe file; shipped recipes are .*temple"):
        load_config("tempel")
    with pytest.raises(InputError, match="a folder without config.yaml"):
        load_config(str(tmp_path))


def test_a_run_folder_is_a_recipe_and_may_move(tmp_path):
    first = load_config("tinyworld", ["--output_dir", str(tmp_path / "a"), "--seed", "7"])
    save_config(first, tmp_path / "a" / "config.yaml")
    assert load_config(str(tmp_path / "a")) == first
    (tmp_path / "a").rename(tmp_path / "b")
    assert load_config(str(tmp_path / "b")) == dataclasses.replace(first, output_dir=str(tmp_path / "b"))


@settings(max_examples=25, deadline=None)
@example(1.0, 0, True, "a\x85b", [2])
@example(1.0, 0, True, "a\u2028 b\u2029", [2])
@given(
    st.floats(1e-12, 1e12), st.integers(-(2**40), 2**40), st.booleans(), st.text(max_size=20),
    st.lists(st.sampled_from([16, 8, 4, 2]), min_size=1, max_size=4, unique=True),
)  # fmt: skip
def test_saving_and_loading_gives_the_same(tmp_path_factory, rate, seed, flag, text, rs):
    config = RunConfig(seed=seed)
    config.train.learning_rate, config.train.trees, config.data.videos, config.pairs.r = rate, flag, text, rs
    config.train.stages = config.train.stages[:0]
    path = tmp_path_factory.mktemp("c") / "config.yaml"
    save_config(config, path)
    assert configio.from_plain(configio.read_recipe(path)) == config


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_of_yaml_are_numbers(value):
    read = configio._parse_yaml(f"a: {value!r}")["a"]
    assert isinstance(read, float) and math.isclose(read, value, rel_tol=1e-15)
    assert configio._parse_yaml("a: 1e-4")["a"] == 1e-4 and configio._parse_yaml("a: 1e4x")["a"] == "1e4x"
    assert yaml.safe_load("a: 1e-4")["a"] == "1e-4"  # why the loader is ours


@pytest.mark.parametrize(("text", "value"), [("true", True), ("none", "none"), ("selective", "selective")])
def test_a_key_of_two_types_takes_either(text, value):
    assert load_config("temple", ["--train.gradient_checkpointing", text]).train.gradient_checkpointing == value


def test_a_key_of_two_types_says_so():
    with pytest.raises(
        InputError, match=r"^--train\.gradient_checkpointing must be true or false or one of none, full, "
    ):
        load_config("temple", ["--train.gradient_checkpointing", "some"])


def test_every_key_has_its_docstring_and_is_in_the_help():
    text = describe_keys()
    for key in known_keys().values():
        assert key.doc or (key.is_section and "." not in key.name), f"{key.name} has no docstring"
        assert key.is_section or f"--{key.name} " in text
    assert "[0.0003]" in describe_keys(load_config("temple", ["--train.learning_rate", "3e-4"]))


@settings(deadline=None)
@given(st.sampled_from(sorted(known_keys())), st.data())
def test_a_typo_finds_its_key(name, data):
    at = data.draw(st.integers(0, len(name) - 1))
    typo = name[:at] + name[at] + name[at:]  # a doubled letter
    assert nearest_key(name) == name or name.split(".")[-1] in configio._ALIASES
    if len(name.split(".")[-1]) > 4 and typo.split(".")[-1] not in configio._ALIASES:
        assert nearest_key(typo) == name
