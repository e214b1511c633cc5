"""``python -m bench head``: every implementation that runs here computes what it says, and the file a script reads."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import head
from bench.cases import CASES, KL_LEVELS, Inputs, make_inputs, make_weight
from bench.impls import ALL, Impl, select
from bench.impls.base import Outputs
from bench.measure import Deadline

ROOT = Path(__file__).parents[2]
SLOW_TO_COMPILE = ("compile", "cce_torch", "liger_chunked_1_compiled", "liger_chunked_4_compiled")
COUNTED = ("one_pass", "recompute", "eager", "plain", "trl_chunked", "liger_chunked_4", "torch_lce")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return make_weight(1201, 24, torch.float32, "cpu")


@pytest.fixture(scope="module")
def check(weight: Tensor) -> head.ErrorCheck:
    return head.ErrorCheck(weight, 30)


def combinations(names: Iterable[str]) -> list[tuple[str, str]]:
    return [(name, case) for name in names for case in CASES if not ALL[name].refuses(CASES[case])]


def runnable(name: str) -> Impl:
    if reason := ALL[name].absent("cpu", torch.float32):
        pytest.skip(f"{name}: {reason}")
    return ALL[name]


@pytest.mark.parametrize(("name", "case"), combinations(name for name in ALL if name not in SLOW_TO_COMPILE))
def test_every_implementation_computes_the_case(name: str, case: str, check: head.ErrorCheck) -> None:
    impl = runnable(name)
    try:
        found = check.of(impl, CASES[case])
    except ValueError as refusal:
        assert (name, case) == ("one_pass", "sft_trained") and "trains" in str(refusal)
        return
    same_dtype = check.of(ALL["eager"], CASES[case])
    for key in ("logp", "d_logp", "d_loss", "d_weight"):
        if key in found:
            assert found[key] <= 10 * same_dtype[key], key
    assert ("d_weight" in found) == CASES[case].trained
    if CASES[case].kl and "logp" in found:
        assert len(found["kl_levels"]) == len(KL_LEVELS)
        for level, mine, eager in zip(KL_LEVELS, found["kl_levels"], same_dtype["kl_levels"], strict=True):
            assert level / 3 < mine["kl_mean"] < 3 * level
            assert mine["d_kl"] <= 10 * eager["d_kl"] and mine["kl"] <= 10 * eager["kl"]
    else:
        assert "kl_levels" not in found


def test_the_compiled_twin_computes_the_case(check: head.ErrorCheck) -> None:
    impl = runnable("compile")
    found, plain = check.of(impl, CASES["rrpo_live"]), check.of(ALL["plain"], CASES["rrpo_live"])
    assert found["d_loss"] <= 10 * plain["d_loss"]


@pytest.mark.parametrize(("name", "case"), combinations(COUNTED))
def test_matmuls_are_as_many_as_stated(name: str, case: str, weight: Tensor) -> None:
    impl = runnable(name)
    inputs = make_inputs(40, weight)
    if (name, case) == ("one_pass", "sft_trained"):
        pytest.skip("refused when called")
    step = impl.step(CASES[case], inputs)
    forward, loss = counted(step.forward, inputs)
    backward, _ = counted(lambda: step.backward(loss), inputs)
    if name == "liger_chunked_4" and case == "rrpo_live":
        assert forward == pytest.approx(impl.gemms(CASES[case])[0], rel=0.02)
    else:
        assert (forward, backward) == pytest.approx(impl.gemms(CASES[case]), rel=0.02)


def counted(call: Any, inputs: Inputs) -> tuple[float, Any]:
    """Matmuls of 2·N·V·D FLOP that ``call`` runs, from the profiler's shapes, and its result."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        result = call()
    first_operand = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1}
    flop = 0
    for event in recorded.events():
        if event.name in first_operand:
            a, b = event.input_shapes[first_operand[event.name] :][:2]
            flop += 2 * math.prod(a) * b[-1]
    n, (v, d) = inputs.hidden.shape[0], inputs.weight.shape
    return flop / (2 * n * v * d), result


def test_one_pass_holds_less_than_eager(weight: Tensor) -> None:
    inputs, setting = make_inputs(40, weight), head.Setting("cpu", 1)
    for case in ("dpo_live", "rrpo_cached"):
        mine, eager = head.measure_case(CASES[case], select(["one_pass", "eager"]), inputs, None, setting)
        assert eager["peak_mib"] > 40 * 1201 * 4 / 2**20
        assert mine["peak_mib"] < eager["peak_mib"] / 2


def test_the_file_has_a_row_for_every_combination(tmp_path: Path) -> None:
    path = tmp_path / "new" / "head.json"
    shape = ("--n", "27", "--v", "601", "--d", "16", "--repetitions", "2", "--threads", "1")
    impls = ("one_pass", "recompute", "eager", "plain", "liger_sm90", "quack")
    done = bench("head", "--device", "cpu", "--json", str(path), *shape, "--impls", *impls, "--again", "plain")
    assert done.returncode == 0, done.stderr
    data = json.loads(path.read_text())
    assert set(data) == {"env", "rows"} and data["env"]["torch"] and data["env"]["threads"] == 1
    rows = {(row["case"], row["impl"]): row for row in data["rows"]}
    assert len(rows) == len(data["rows"])
    assert {(case, impl) for case in CASES for impl in impls} <= set(rows)
    assert ("dpo_live", "plain_again") in rows
    for (case, impl), row in rows.items():
        assert row["shape"] == [27, 601, 16] and row["dtype"] == "float32"
        if "skipped" in row:
            assert isinstance(row["skipped"], str) and "ms" not in row and f"skipped {impl}: " in done.stdout
            continue
        assert row["repetitions"] == 2 and row["peak_mib"] > 0
        for part in (row, row["forward"], row["backward"]):
            assert 0 < part["ms_min"] <= part["ms"] <= part["ms_max"] and part["ms_cpu"] >= 0
        assert row["tflops"] == pytest.approx(sum(row["gemms"]) * 2 * 27 * 601 * 16 / row["ms"] / 1e9)
        assert row["forward"]["ms_min"] + row["backward"]["ms_min"] <= row["ms_max"] * (1 + 1e-6)
        if not impl.endswith("_again"):
            assert row["error"]["d_loss"] > 0 and ("kl_levels" in row["error"]) == CASES[case].kl
    assert "skipped" in rows["sft_trained", "one_pass"] and "refused" in rows["sft_trained", "one_pass"]["skipped"]
    assert "statistics" in rows["rrpo_cached", "plain"]["skipped"] and "skipped" in rows["rrpo_live", "quack"]


def test_what_is_not_installed_is_a_row_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "head.json"
    small = ["--n", "8", "--v", "31", "--d", "4", "--repetitions", "1", "--error-tokens", "0"]
    peers = ["liger_chunked", "liger_flce", "cce", "trl_chunked", "quack"]
    assert head.main([*small, "--json", str(path), "--cases", "dpo_live", "--impls", "plain", *peers]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert rows[0]["impl"] == "plain" and "ms" in rows[0]
    assert len(rows) == 1 + 4 + 4 and all("is not installed" in row["skipped"] for row in rows[1:])
    assert "skipped trl_chunked: trl is not installed" in capsys.readouterr().out


class Broken(Impl):
    def __init__(self, name: str, problem: Exception, after: int = 0) -> None:
        super().__init__(name)
        self.problem = problem
        self.calls_left = after

    def gemms(self, case: Any) -> tuple[float, float]:
        return 1, 1

    def outputs(self, case: Any, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Outputs:
        if self.calls_left == 0:
            raise self.problem
        self.calls_left -= 1
        return (hidden @ weight.T).logsumexp(-1), None, None


def test_one_that_breaks_leaves_the_others_standing(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(8, weight)
    impls = [
        Broken("at_once", RuntimeError("kernel lost\nmore")), Broken("no", ValueError("too odd")),
        Broken("late", RuntimeError("lost again"), after=2), Broken("big", torch.OutOfMemoryError("all of it")),
        ALL["plain"],
    ]  # fmt: skip
    rows = head.measure_case(CASES["sft_trained"], impls, inputs, None, head.Setting("cpu", 2), ["late"])
    reasons = [row.get("skipped", "").removeprefix("failed: RuntimeError: ") for row in rows]
    assert reasons == ["kernel lost", "refused: too odd", *["lost again"] * 2, "out of memory: all of it", ""]
    for impl in impls:
        monkeypatch.setitem(ALL, impl.name, impl)
    assert not head.failed(rows)
    for impl in impls[:4]:
        monkeypatch.setattr(impl, "ours", True)
    assert [row["impl"] for row in head.failed(rows)] == ["at_once", "late", "late_again"]


def test_a_deadline_drops_the_last_and_cuts_repetitions(weight: Tensor) -> None:
    inputs, now = make_inputs(8, weight), [0.0]

    class Slow(Broken):
        def outputs(self, *args: Any) -> Outputs:
            now[0] += 1
            return super().outputs(*args)

    impls = [Slow(f"slow{i}", RuntimeError(), after=100) for i in range(3)]
    setting = head.Setting("cpu", 50, Deadline(5, lambda: now[0]))
    rows = head.measure_case(CASES["sft_trained"], impls, inputs, None, setting)
    # two calls warm each up: after the third none is left, but what was started gives one round
    assert [row.get("repetitions") for row in rows] == [1, 1, 1]
    rows = head.measure_case(CASES["sft_trained"], impls, inputs, None, setting)
    assert [row.get("skipped") for row in rows] == [head.NO_TIME] * 3
    setting.deadline = Deadline(3, lambda: now[0])
    rows = head.measure_case(CASES["sft_trained"], impls, inputs, None, setting)
    assert [row.get("skipped") for row in rows] == [None, None, head.NO_TIME]


def test_names_and_impossible_options() -> None:
    assert [impl.name for impl in select(["liger_chunked", "cce"])] == [
        "liger_chunked_1", "liger_chunked_4", "liger_chunked_1_compiled", "liger_chunked_4_compiled", "cce",
    ]  # fmt: skip
    assert [impl.name for impl in select(None)] == list(ALL)
    with pytest.raises(ValueError, match="no implementation 'ligr'"):
        select(["ligr"])
    done = bench("head", "--n", "3")
    assert done.returncode == 2 and "--n must be at least 8" in done.stderr
    done = bench("head", "--impls", "one_pas")
    assert done.returncode == 2 and "'one_pas'" in done.stderr


def test_unknown_name_lists_what_there_is() -> None:
    done = bench("haed")
    assert done.returncode == 2 and "'haed'" in done.stderr and "head" in done.stderr
    assert bench().returncode == 2
    assert bench("--help").returncode == 0
