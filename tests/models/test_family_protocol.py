"""A family is a file and an entry: everything else goes through the protocol."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import tempo_fast
from tempo_fast.config import GenerationConfig
from tempo_fast.evaluation.scoring import score
from tempo_fast.generation import Request, make_engine
from tempo_fast.trees.vision import FeatureCache

ROOT = Path(tempo_fast.__file__).parent


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return names


def test_no_module_outside_names_a_family() -> None:
    families = {f"tempo_fast.models.{p.stem}" for p in (ROOT / "models").glob("*.py")}
    families -= {f"tempo_fast.models.{name}" for name in ("__init__", "family", "liger", "load")}
    assert families
    # tinyworld makes a model of one family
    outside = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in ("models", "tinyworld")]
    assert len(outside) > 50
    assert {p.name: imported(p) & families for p in outside if imported(p) & families} == {}


class Hidden(nn.Module):
    """A model whose parts have other names than any that exist."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inside = inner


class Finding:
    """The family of ``Hidden``."""

    def __init__(self, family: Any) -> None:
        self.family = family

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.family, name)
        if not callable(value):
            return value
        return lambda *args, **more: value(*[a.inside if isinstance(a, Hidden) else a for a in args], **more)


@pytest.mark.parametrize("what", ["score", "generate"])
def test_scores_and_answers_use_the_protocol_alone(tiny: Any, reader: Any, make_plan: Any, what: str) -> None:
    plan, items = make_plan("v", 5), [("Say it.", ["A red circle.", "No."]), ("So?", ["No"])]
    other = copy.copy(tiny)
    other.model, other.family = Hidden(tiny.model), Finding(tiny.family)

    def run(bundle: Any) -> Any:
        if what == "score":
            return score(bundle, reader, FeatureCache(), [plan], items)
        engine = make_engine(GenerationConfig(max_new_tokens=6), bundle, reader, FeatureCache(), 0)
        return engine.generate([Request((plan,), "Say it."), Request((), "So?")])

    assert run(other) == run(tiny)
