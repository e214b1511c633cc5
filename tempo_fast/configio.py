"""Recipes and command-line overrides to a validated ``RunConfig``, and back to YAML.

The recipe is plain YAML in the shape of ``RunConfig``; overrides are ``--dotted.key value`` and win over it. Types are
checked and converted by jsonargparse; unknown keys are answered here, with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tempo_fast.config import RunConfig, StageConfig
from tempo_fast.errors import InputError
from tempo_fast.files import to_plain, write_atomic

RECIPES = Path(__file__).resolve().parent / "recipes"

# What people write who come from TRL or ms-swift
_ALIASES = {
    "beta": "train.objective.options.beta",
    "rpo_alpha": "train.objective.options.sft_weight",
    "loss_type": "train.objective.name",
    "lr": "train.learning_rate",
    "per_device_train_batch_size": "train.batch_size",
    "max_length": "train.max_tokens",
    "num_train_epochs": "train.stages",
    "lora_rank": "train.lora.r",
    "lora_alpha": "train.lora.alpha",
    "lora_dropout": "train.lora.dropout",
    "save_total_limit": "train.keep_checkpoints",
    "model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "dataset": "data.videos",
}


@dataclass(frozen=True)
class Key:
    """One entry of the configuration: a value, or a section (``is_section``)."""

    name: str
    type: Any
    default: Any
    doc: str
    is_section: bool


@cache
def known_keys() -> dict[str, Key]:
    """Every dotted key of ``RunConfig`` in the order of its declaration."""
    return {key.name: key for key in _walk(RunConfig, RunConfig(), "")}


def _walk(cls: type, default: Any, prefix: str) -> Iterator[Key]:
    hints, docs = typing.get_type_hints(cls), _docs(cls)
    for f in dataclasses.fields(cls):
        name, hint, value = prefix + f.name, hints[f.name], getattr(default, f.name)
        section = dataclasses.is_dataclass(hint)
        yield Key(name, hint, value, docs.get(f.name, ""), section)
        if section:
            yield from _walk(hint, value, name + ".")


def _docs(cls: type) -> dict[str, str]:
    from docstring_parser import parse_from_object

    return {p.arg_name: " ".join((p.description or "").split()) for p in parse_from_object(cls).params}


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A YAML file, a run folder (its ``config.yaml``), or the name of a shipped recipe. Raises InputError."""
    path = Path(name)
    if path.is_file():
        return path
    if (path / "config.yaml").is_file():
        return path / "config.yaml"
    shipped = RECIPES / f"{path.stem}.yaml"
    if path.parent.name in ("", "recipes") and path.suffix in ("", ".yaml") and shipped.is_file():
        return shipped
    if path.is_dir():
        raise InputError(f"{name}: a folder without config.yaml; give a recipe, or the folder of an earlier run")
    raise InputError(f"{name}: no such recipe file; shipped recipes are {', '.join(shipped_recipes())}")


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file (``1e-4`` is a number). Raises InputError naming the file and, if known, line."""
    import yaml

    try:
        data = _parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InputError(f"{where}: not valid YAML ({getattr(e, 'problem', None) or 'unreadable'})") from e
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or 'not UTF-8 text'})") from e
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of sections, got {'nothing' if data is None else repr(data)}")
    return data


def _parse_yaml(text: str) -> Any:
    """YAML with the numbers of YAML 1.2: PyYAML alone reads ``1e-4`` as text."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return yaml.load(text, Loader)  # noqa: S506 - a subclass of the safe loader


def split_overrides(args: Sequence[str]) -> list[tuple[str, str]]:
    """``--a.b 1 --c=2`` to [("a.b", "1"), ("c", "2")]. Raises InputError for a stray word or a key without a value."""
    pairs: list[tuple[str, str]] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise InputError(f"{word}: unexpected word; overrides are written --key.sub value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                _check_known(key, "--")
                raise InputError(f"--{key}: needs a value")
            value = rest.pop(0)
        pairs.append((key.replace("-", "_"), value))
    return pairs


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply ``--key.sub value`` overrides, check types and ranges.

    Raises:
        InputError: one sentence naming the file (or the option) and the key.
    """
    path = find_recipe(recipe)
    data = read_recipe(path)
    _check_tree(data, RunConfig, "", f"{path}: ")
    if (Path(recipe) / "config.yaml").is_file() and Path(data.get("output_dir", "")).resolve() != Path(
        recipe
    ).resolve():
        data["output_dir"] = recipe  # the run was moved
    options = split_overrides(overrides)
    for key, text in options:
        _set(data, key, text)
    config = from_plain(data, f"{path}: ", options=[key for key, _ in options])
    config.validate()
    check_objective(config)
    return config


def from_plain(data: dict[str, Any], where: str = "config: ", *, options: Sequence[str] = ()) -> RunConfig:
    """A nested mapping to ``RunConfig``, types checked, ranges not.

    Raises:
        InputError: starting with ``where``, or with ``--`` for the keys in ``options`` (given on the command line).
    """
    from jsonargparse import ArgumentError, ArgumentParser

    _check_tree(data, RunConfig, "", where)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig)
    try:
        return RunConfig(**vars(parser.instantiate_classes(parser.parse_object(data))))
    except ArgumentError as e:
        key, sentence = _sentence(str(e))
        ours = any(option == key or option.startswith(key + ".") for option in options)
        raise InputError(("--" if ours else where) + sentence) from e


def check_objective(config: RunConfig) -> None:
    """The objectives' names and options, which they check themselves. Raises InputError naming the key."""
    from tempo_fast.config.curriculum import objective_of
    from tempo_kernels.objectives import make_objective

    train = config.train
    objectives = {"train.objective": train.objective}
    for i, stage in enumerate(train.stages):
        if (own := objective_of(stage, train.objective)) != train.objective:
            objectives[f"train.stages[{i}].objective"] = own
    for key, objective in objectives.items():
        try:
            made = make_objective(objective.name, **objective.options)
        except (ValueError, TypeError) as e:
            raise InputError(f"config: {key}: {e}") from e
        if made.extra_inputs:
            raise InputError(
                f"config: {key}.name: {objective.name} needs {' and '.join(made.extra_inputs)} from its caller,"
                " which the preference stages do not make; use it through tempo_kernels.objectives"
            )
        if made.needs_kl and train.tune_head:
            raise InputError(
                f"config: train.tune_head: {objective.name} needs the KL, which cached statistics give only while the"
                " head is frozen; leave tune_head false"
            )
        if made.name == "sft":
            raise InputError(f"config: {key}.name: sft compares nothing; the SFT stage is train.sft")


def save_config(config: RunConfig, path: str | Path) -> None:
    """The resolved configuration as YAML that ``load_config`` reads back to an equal one."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """YAML reads U+0085, U+2028 and U+2029 as line ends unless they are written as escapes."""

    def write_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = '"' if any(c in value for c in "\x85\u2028\u2029") else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, write_text)
    text = yaml.dump(to_plain(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    write_atomic(path, lambda f: f.write(text.encode()))


def describe_keys(config: RunConfig | None = None) -> str:
    """Every key with its docstring and value: what ``tempo-fast run RECIPE --help`` prints."""
    lines: list[str] = []
    for key in known_keys().values():
        if key.is_section:
            if "." not in key.name:
                lines.append("")
            continue
        value = _get(to_plain(config), key.name) if config is not None else to_plain(key.default)
        lines.append(f"  --{key.name} {type_name(key.type, short=True)}  [{_brief(value)}]")
        lines += textwrap.wrap(key.doc, 112, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines).strip("\n")


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return ", ".join(map(_brief, value))
    return "empty" if value == "" else str(value)


def _get(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def type_name(hint: Any, short: bool = False) -> str:
    """A type in words: ``a number``, ``one of auto, pyav``; ``short`` for synopses."""
    if typing.get_origin(hint) is Literal:
        values = [str(v) for v in typing.get_args(hint)]
        return "|".join(values) if short else f"one of {', '.join(values)}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return ("|" if short else " or ").join(type_name(part, short) for part in typing.get_args(hint))
    long, brief = {
        int: ("a whole number", "INT"),
        float: ("a number", "FLOAT"),
        bool: ("true or false", "BOOL"),
        str: ("text", "TEXT"),
        list[int]: ("a list of whole numbers", "[INT, ...]"),
        list[float]: ("a list of numbers", "[NUMBER, ...]"),
        list[str]: ("a list of names", "[NAME, ...]"),
        dict[str, float]: ("a mapping of names to numbers", "{NAME: NUMBER, ...}"),
    }.get(hint, ("a list of mappings", "[{...}, ...]"))
    return brief if short else long


def nearest_key(key: str) -> str:
    """The known key that someone who wrote ``key`` most likely meant."""
    last = key.split(".")[-1]
    if last in _ALIASES:
        return _ALIASES[last]
    names = [k.name for k in known_keys().values()] + [
        f"train.stages.0.{f.name}" for f in dataclasses.fields(StageConfig)
    ]

    def score(name: str) -> float:
        tail = difflib.SequenceMatcher(None, last, name.split(".")[-1]).ratio()
        return 0.6 * tail + 0.4 * difflib.SequenceMatcher(None, key, name).ratio()

    return max(names, key=score)


def _unknown(where: str, key: str) -> InputError:
    return InputError(f"{where}{key} is not a known key; the nearest is {nearest_key(key)}")


def _check_known(key: str, where: str) -> Any:
    """The type of a dotted key; entries of lists and mappings count. Raises InputError."""
    hint: Any = RunConfig
    for part in key.split("."):
        if dataclasses.is_dataclass(hint):
            hints = typing.get_type_hints(hint)
            if part not in hints:
                raise _unknown(where, key)
            hint = hints[part]
        elif typing.get_origin(hint) is list and part.isdigit():
            hint = typing.get_args(hint)[0]
        elif typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        else:
            raise _unknown(where, key)
    return hint


def _check_tree(data: Any, cls: Any, prefix: str, where: str) -> None:
    """Names and shapes of a nested mapping; leaf types are left to the parser."""
    hints = typing.get_type_hints(cls)
    for name, value in data.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise _unknown(where, key)
        hint = hints[name]
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is list else None
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise InputError(f"{where}{key} is a section of keys, got {value!r}")
            _check_tree(value, hint, key + ".", where)
        elif dataclasses.is_dataclass(inner):
            if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
                raise InputError(f"{where}{key} must be a list of mappings, got {value!r}")
            for i, item in enumerate(value):
                _check_tree(item, inner, f"{key}.{i}.", where)


def _set(data: dict[str, Any], key: str, text: str) -> None:
    """Put one override into the mapping. Lists and sections are replaced whole, or entered with a number or name."""
    import yaml

    where = "--"
    hint = _check_known(key, where)
    value: Any = text
    if hint is not str:
        try:
            value = _parse_yaml(text)
        except yaml.YAMLError as e:
            raise InputError(f"{where}{key} must be {type_name(hint)}, got {text!r}") from e
    *parents, last = key.split(".")
    node: Any = data
    for i, part in enumerate(parents):
        if isinstance(node, list):
            if int(part) >= len(node):
                raise InputError(f"{where}{key}: there are only {len(node)} entries")
            node = node[int(part)]
            continue
        if part not in node:
            here = ".".join(parents[: i + 1])
            default = to_plain(known_keys()[here].default)
            # a section starts empty and fills up from its defaults; a list or mapping starts from its default
            node[part] = {} if known_keys()[here].is_section else default
        node = node[part]
    if isinstance(node, list):
        if int(last) >= len(node):
            raise InputError(f"{where}{key}: there are only {len(node)} entries")
        node[int(last)] = value
    else:
        node[last] = value


def _sentence(message: str) -> tuple[str, str]:
    """(key, one sentence naming it) of jsonargparse's indented paragraphs."""
    key = ".".join(re.findall(r'[Kk]ey "([^"]+)"', message))
    got = re.search(r"(?:Got|Given) value: (.*)", message)
    if not key:
        return "", " ".join(message.split())
    hint = _entry_type(key)
    expected = type_name(hint) if hint is not None else "of another type"
    return key, f"{key} must be {expected}" + (f", got {got[1]}" if got else "")


def _entry_type(key: str) -> Any:
    """The type of a key that does not tell the numbers of the list entries it leads through; None if there is none."""
    hint: Any = RunConfig
    for part in key.split("."):
        while typing.get_origin(hint) is list:
            hint = typing.get_args(hint)[0]
        if typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        else:
            hint = typing.get_type_hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    return hint
