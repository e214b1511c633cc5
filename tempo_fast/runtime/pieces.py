"""What an engine saves: pieces of named parameters. They fit any number of ranks, any ZeRO stage and plain torch.

A state is ``{"format", "engine", "world", "step", "shapes": {name: [...]}, "pieces": [[name, start, {kind: [n]}]]}``:
values ``start .. start + n`` of the flattened parameter, for each kind (``master``, the float32 weight, and AdamW's two
moments). The states of all ranks together hold every value of what trains once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tempo_fast.errors import InputError

FORMAT = 2
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Slot(NamedTuple):
    """Where an engine keeps values of a parameter: ``n`` from ``start`` on (in the flattened parameter) lie in
    ``owner``, a float32 tensor that AdamW updates, from ``offset`` on."""

    name: str
    start: int
    n: int
    owner: Tensor
    offset: int


def shapes_of(params: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Full shapes, of parameters that ZeRO-3 has partitioned too."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in params.items()}


def whole(params: Mapping[str, Tensor]) -> list[Slot]:
    """Slots of parameters that are their own masters."""
    return [Slot(name, 0, p.numel(), p, 0) for name, p in params.items()]


def share(slots: Sequence[Slot], rank: int, world: int) -> list[Slot]:
    """This rank's part of slots that every rank has: about as many values on each."""
    total, before, mine = sum(s.n for s in slots), 0, []
    for slot in slots:
        if before * world // max(1, total) == rank:
            mine.append(slot)
        before += slot.n
    return mine


def save_pieces(
    slots: Iterable[Slot],
    optimizer: torch.optim.Optimizer,
    shapes: Mapping[str, Sequence[int]],
    engine: str,
    world: int,
) -> dict[str, Any]:
    """A state of these slots, copied to the CPU. Before the first update it holds no moments."""
    copies: dict[int, dict[str, Tensor]] = {}
    pieces: list[list[Any]] = []
    for slot in slots:
        if id(slot.owner) not in copies:
            kept = optimizer.state.get(slot.owner, {})
            values = {"master": slot.owner, **{k: kept[k] for k in _MOMENTS if k in kept}}
            copies[id(slot.owner)] = {k: v.detach().to("cpu", copy=True).view(-1) for k, v in values.items()}
        # views: each flat tensor is written once
        flat = copies[id(slot.owner)]
        pieces.append([slot.name, slot.start, {k: v[slot.offset : slot.offset + slot.n] for k, v in flat.items()}])
    return {
        "format": FORMAT,
        "engine": engine,
        "world": world,
        "step": steps_taken(optimizer),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "pieces": pieces,
    }


def load_pieces(
    slots: Sequence[Slot],
    optimizer: torch.optim.Optimizer,
    shapes: Mapping[str, Sequence[int]],
    states: Mapping[str, Any] | Iterable[Mapping[str, Any]],
) -> None:
    """Fill the slots and AdamW's state from states, read only as far as needed.

    Args:
        states: one, or one after the other those of all ranks that saved; a rank's own one first.

    Raises:
        InputError: of another model, of an older format, or some values are in none of them.
    """
    wanted: dict[str, list[Slot]] = {}
    for slot in slots:
        wanted.setdefault(slot.name, []).append(slot)
    left = sum(slot.n for slot in slots)
    targets: dict[int, dict[str, Tensor]] = {}
    seen: set[tuple[str, int]] = set()
    with torch.no_grad():
        for state in _each(states):
            if state.get("format") != FORMAT:
                raise InputError(f"checkpoint: its format is {state.get('format')}, this version reads {FORMAT}")
            check_names(state["shapes"], shapes)
            for name, start, values in state["pieces"]:
                if (name, start) in seen:
                    continue
                seen.add((name, start))
                for slot in wanted.get(name, ()):
                    first, last = max(start, slot.start), min(start + len(values["master"]), slot.start + slot.n)
                    if first >= last:
                        continue
                    into = _targets(targets, slot.owner, optimizer, state["step"])
                    at = slot.offset + first - slot.start
                    for kind, value in values.items():
                        into[kind][at : at + last - first].copy_(value[first - start : last - start])
                    left -= last - first
            if left <= 0:
                return
    if left:
        raise InputError(f"checkpoint: {left} of {sum(s.n for s in slots)} trained values are in none of its files")


def _each(states: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    if isinstance(states, Mapping):
        yield states
    else:
        yield from states


def _targets(
    made: dict[int, dict[str, Tensor]], owner: Tensor, optimizer: torch.optim.Optimizer, step: int
) -> dict[str, Tensor]:
    if id(owner) not in made:
        made[id(owner)] = {"master": owner.detach().view(-1)}
        if step:
            moments = {kind: torch.zeros_like(owner, requires_grad=False) for kind in _MOMENTS}
            # the step counter stays on the CPU, where AdamW keeps it
            optimizer.state[owner] = {"step": torch.tensor(float(step)), **moments}
            made[id(owner)] |= {kind: value.view(-1) for kind, value in moments.items()}
        else:
            optimizer.state.pop(owner, None)
    return made[id(owner)]


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Updates that AdamW has made; they are the same for all it updates."""
    return int(max((float(kept["step"]) for kept in optimizer.state.values() if "step" in kept), default=0.0))


def check_names(stored: Mapping[str, Sequence[int]], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises InputError naming the first parameter that a checkpoint lacks, has too much or in another shape."""
    for name in sorted(set(stored) ^ set(shapes)):
        raise InputError(f"checkpoint: parameter {name} is {'missing' if name in shapes else 'not in this model'}")
    for name, shape in shapes.items():
        if tuple(stored[name]) != tuple(shape):
            raise InputError(f"checkpoint: {name} has shape {tuple(stored[name])}, the model {tuple(shape)}")
