"""Statistics on disk: what was written comes back, and nothing else is taken for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tempo_kernels.head import HeadStatistics, head_statistics, linear_logp

safetensors = pytest.importorskip("safetensors.torch")

N, V, D = 5, 37, 8


@pytest.fixture
def made() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    labels, bias = torch.randint(0, V, (N,), generator=g), torch.randn(V, generator=g)
    return {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias}


def statistics_of(made: dict[str, Any], **options: Any) -> HeadStatistics:
    return head_statistics(made["hidden"], made["weight"], made["labels"], **options)


@pytest.mark.parametrize("kl", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_come_back_as_they_were(made: dict[str, Any], kl: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    made = made | {"hidden": made["hidden"].to(dtype), "weight": made["weight"].to(dtype)}
    stats = statistics_of(made, kl=kl)
    path = tmp_path / "s.safetensors"
    stats.save(path, made["weight"], metadata={"tokens": "abc"})
    back = HeadStatistics.load(path, made["weight"], metadata={"tokens": "abc"})
    for a, b in zip(stats, back, strict=True):
        assert (a is None and b is None) or (torch.equal(a, b) and a.dtype == b.dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    live = linear_logp(made["hidden"], made["weight"], made["labels"], reference=back)
    assert torch.equal(live.logp, back.logp)
    assert not kl or torch.equal(live.kl, torch.zeros_like(live.kl))


def test_no_tokens_and_a_strided_head(made: dict[str, Any], tmp_path: Path) -> None:
    made = made | {"hidden": made["hidden"][:0], "labels": made["labels"][:0]}
    strided = made["weight"].T.contiguous().T
    statistics_of(made).save(tmp_path / "s", strided)
    assert HeadStatistics.load(tmp_path / "s", made["weight"]).mean_embedding.shape == (0, D)


def test_another_head_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "s"
    statistics_of(made, bias=made["bias"]).save(path, made["weight"], bias=made["bias"])
    HeadStatistics.load(path, made["weight"], bias=made["bias"])
    HeadStatistics.load(path, None)
    other = made["weight"].clone()
    other[-1, -1] += 1e-7
    heads: list[tuple[Any, Any]] = [
        (other, made["bias"]), (made["weight"], None), (made["weight"], -made["bias"]),
        (made["weight"][:-1], made["bias"]), (made["weight"].double(), made["bias"]),
    ]  # fmt: skip
    for weight, bias in heads:
        with pytest.raises(ValueError, match="another head"):
            HeadStatistics.load(path, weight, bias=bias)


def test_other_metadata_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    statistics_of(made).save(tmp_path / "s", made["weight"], metadata={"tokens": "abc", "model": "m"})
    HeadStatistics.load(tmp_path / "s", made["weight"], metadata={"model": "m"})
    for metadata in ({"tokens": "abd"}, {"frames": "1"}):
        with pytest.raises(ValueError, match=next(iter(metadata))):
            HeadStatistics.load(tmp_path / "s", made["weight"], metadata=metadata)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lse": None}, "expected"),
        ({"mean_logit": None}, "expected"),
        ({"extra": torch.zeros(N)}, "extra"),
        ({"lse": torch.zeros(N + 1)}, "lse"),
        ({"logp": torch.zeros(())}, "logp"),
        ({"mean_embedding": torch.zeros(N, D + 1)}, "mean_embedding"),
        ({"mean_embedding": torch.zeros(N)}, "mean_embedding"),
        ({"mean_embedding": torch.zeros(())}, "mean_embedding"),
        ({"mean_logit": torch.zeros(N, dtype=torch.float64)}, "mean_logit"),
        ({"logp": torch.zeros(N, dtype=torch.bfloat16)}, "bfloat16"),
        ({"lse": torch.full((N,), torch.nan)}, "not finite"),
    ],
)
def test_files_that_hold_something_else_are_refused(
    made: dict[str, Any], change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    statistics_of(made).save(path, made["weight"])
    with safetensors.safe_open(str(path), framework="pt") as f:
        header, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    safetensors.save_file(tensors, path, header)
    HeadStatistics.load(path, made["weight"])  # rewritten as it was
    safetensors.save_file({k: v for k, v in (tensors | change).items() if v is not None}, path, header)
    for weight in (made["weight"], None):
        if words == "mean_embedding" and weight is None and change["mean_embedding"].ndim == 2:
            continue  # only the head knows D
        with pytest.raises(ValueError, match=words):
            HeadStatistics.load(path, weight)


def test_truncated_and_foreign_files_are_refused(made: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "s"
    stats = statistics_of(made)
    stats.save(path, made["weight"])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        HeadStatistics.load(path, made["weight"])
    safetensors.save_file({"logp": stats.logp}, path)
    with pytest.raises(ValueError, match="format"):
        HeadStatistics.load(path, made["weight"])


def test_a_failed_write_leaves_the_old_file(made: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    stats, path = statistics_of(made), tmp_path / "s"
    stats.save(path, made["weight"])
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        stats._replace(logp=stats.logp + 1).save(path, made["weight"])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["s"]


def test_broken_statistics_are_not_written(made: dict[str, Any], tmp_path: Path) -> None:
    stats = statistics_of(made)
    with pytest.raises(ValueError, match="these statistics"):
        stats._replace(lse=stats.lse[1:]).save(tmp_path / "s", made["weight"])
    assert not list(tmp_path.iterdir())
