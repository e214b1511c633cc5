"""States are cut by name and position: whatever ranks wrote them, any other cut reads the same values back."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo_fast.errors import InputError
from tempo_fast.runtime.pieces import Slot, load_pieces, save_pieces, shapes_of, share, whole


def flat_ranks(params: dict[str, Tensor], world: int, order: list[str]) -> list[list[Slot]]:
    """As ZeRO-2 cuts: all parameters in one row, filled up, in equal parts."""
    total = sum(params[n].numel() for n in order)
    size = -(-total // world)
    row = torch.cat([params[n].detach().reshape(-1) for n in order] + [torch.zeros(size * world - total)])
    out = []
    for rank in range(world):
        owner, at, slots = torch.nn.Parameter(row[rank * size : (rank + 1) * size].clone()), 0, []
        for name in order:
            first, last = max(at, rank * size), min(at + params[name].numel(), (rank + 1) * size)
            if first < last:
                slots.append(Slot(name, first - at, last - first, owner, first - rank * size))
            at += params[name].numel()
        out.append(slots)
    return out


def own_ranks(params: dict[str, Tensor], world: int) -> list[list[Slot]]:
    """As ZeRO-3 cuts: every parameter in equal parts, the last one filled up."""
    out: list[list[Slot]] = []
    for rank in range(world):
        pieces, slots, at = [], [], 0
        for name, p in params.items():
            size = -(-p.numel() // world)
            padded = torch.cat([p.detach().reshape(-1), torch.zeros(size * world - p.numel())])
            n = min(size, p.numel() - rank * size)
            pieces.append(padded[rank * size : (rank + 1) * size])
            if n > 0:
                slots.append((name, rank * size, n, at))
            at += size
        owner = torch.nn.Parameter(torch.cat(pieces))
        out.append([Slot(name, start, n, owner, at) for name, start, n, at in slots])
    return out


def adam(slots: list[Slot]) -> Any:
    owners = list({id(s.owner): s.owner for s in slots}.values()) or [torch.nn.Parameter(torch.zeros(1))]
    return torch.optim.AdamW(owners, lr=0.1)


def train(slots: list[Slot], optimizer: Any, seed: int) -> None:
    """Two updates whose gradient depends on name and position alone."""
    for step in range(2):
        for group in optimizer.param_groups:
            for owner in group["params"]:
                owner.grad = torch.zeros_like(owner)
        for s in slots:
            at = torch.arange(s.start, s.start + s.n)
            s.owner.grad.view(-1)[s.offset : s.offset + s.n] = torch.sin(at * 1.7 + len(s.name) + seed + step)
        optimizer.step()


def cut(params: dict[str, Tensor], how: str, world: int, order: list[str]) -> list[list[Slot]]:
    if how == "whole":
        return [whole({name: torch.nn.Parameter(p.detach().clone()) for name, p in params.items()})]
    return flat_ranks(params, world, order) if how == "flat" else own_ranks(params, world)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_cut_reads_what_any_other_wrote(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=6))
    made = {"p" * (i + 1): torch.nn.Parameter(torch.randn(shape)) for i, shape in enumerate(shapes)}
    hows, worlds = st.sampled_from(["whole", "flat", "own"]), st.integers(1, 5)
    order = data.draw(st.permutations(list(made)))
    first = cut(made, data.draw(hows), data.draw(worlds), order)
    states = []
    for slots in first:
        optimizer = adam(slots)
        train(slots, optimizer, 0)
        file = io.BytesIO()
        torch.save(save_pieces(slots, optimizer, shapes_of(made), "torch", len(first)), file)
        file.seek(0)
        states.append(torch.load(file, weights_only=True))
    # what one process holds that trains on undisturbed is the truth
    twins = {name: torch.nn.Parameter(p.detach().clone()) for name, p in made.items()}
    truth, optimizer = whole(twins), adam(whole(twins))
    train(truth, optimizer, 0)
    train(truth, optimizer, 7)
    blank = {name: torch.nn.Parameter(torch.zeros_like(p)) for name, p in made.items()}
    for slots in cut(blank, data.draw(hows), data.draw(worlds), data.draw(st.permutations(list(made)))):
        other = adam(slots)
        load_pieces(slots, other, shapes_of(made), states if data.draw(st.booleans()) else reversed(states))
        train(slots, other, 7)
        for s in slots:
            expected = twins[s.name].detach().reshape(-1)[s.start : s.start + s.n]
            assert torch.equal(s.owner.detach().reshape(-1)[s.offset : s.offset + s.n], expected)


def test_files_after_the_last_needed_one_are_not_read() -> None:
    made = {"a": torch.nn.Parameter(torch.randn(4)), "b": torch.nn.Parameter(torch.randn(3))}
    state = save_pieces(whole(made), adam(whole(made)), shapes_of(made), "torch", 1)

    def files() -> Any:
        yield state
        raise AssertionError("read too far")

    load_pieces(whole(made), adam(whole(made)), shapes_of(made), files())
    half = {**state, "pieces": state["pieces"][:1]}
    with pytest.raises(InputError, match="3 of 7 trained values are in none of its files"):
        load_pieces(whole(made), adam(whole(made)), shapes_of(made), [half, half])


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 9))
def test_shares_hold_every_slot_once_and_alike(sizes: list[int], world: int) -> None:
    slots = [Slot(str(i), 0, n, torch.zeros(1), 0) for i, n in enumerate(sizes)]
    shares = [share(slots, rank, world) for rank in range(world)]
    assert [s for part in shares for s in part] == slots
    assert max(sum(s.n for s in part) for part in shares) <= sum(sizes) / world + max(sizes)
