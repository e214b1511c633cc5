"""From scores to tokens: repetition penalty, temperature, top-p, and draws that belong to one request alone.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class PrivateSampling:
    """How one request draws: its temperature (above 0), its ``top_p`` in (0, 1], and a generator of its own.

    A token costs one number in [0, 1), made on the CPU, so that an answer depends neither on its company nor, but for
    rounding, on the device.
    """

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self.temperature, self.top_p = temperature, top_p
        self._generator = torch.Generator().manual_seed(seed)

    def number(self) -> float:
        """The next one."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def choose(scores: Tensor, rows: Sequence[PrivateSampling | None]) -> list[int]:
    """A token per row of scores [B, V] float32: the largest where the row has no sampling, else a draw from
    softmax(scores / temperature) within ``top_p``."""
    tokens = scores.argmax(-1)
    drawn = [(i, row) for i, row in enumerate(rows) if row is not None]
    if drawn:
        places = torch.tensor([i for i, _ in drawn], device=scores.device)
        temperature = [row.temperature for _, row in drawn]
        kept = nucleus(scores[places] / scores.new_tensor(temperature)[:, None], [row.top_p for _, row in drawn])
        tokens[places] = invert(kept.softmax(-1), [row.number() for _, row in drawn])
    return tokens.tolist()


def nucleus(scores: Tensor, top_p: Sequence[float]) -> Tensor:
    """Scores [B, V] with -inf outside the likeliest tokens that together reach ``top_p`` of their row; at least one
    stays. The rule of transformers' ``TopPLogitsWarper`` (huggingface/transformers:
    src/transformers/generation/logits_process.py): the tail whose mass, summed from the least likely token up, is at
    most 1 - top_p, goes."""
    if all(p >= 1 for p in top_p):
        return scores
    ordered, order = scores.sort(descending=False, stable=True)
    gone = ordered.softmax(-1).cumsum(-1) <= scores.new_tensor([1 - p for p in top_p])[:, None]
    gone &= (scores.new_tensor(list(top_p)) < 1)[:, None]
    gone[:, -1] = False
    return scores.masked_fill(torch.zeros_like(gone).scatter(1, order, gone), -torch.inf)


def invert(probabilities: Tensor, numbers: Sequence[float]) -> Tensor:
    """Tokens [B] of ``numbers`` in [0, 1): where the running sum of probabilities [B, V], in the order of the
    vocabulary, passes the number. (In the order of likelihood two tokens that are about as likely would change places
    with the rounding of a batch.)"""
    total = probabilities.double().cumsum(-1)
    wanted = total[:, -1] * torch.tensor(numbers, dtype=torch.float64, device=total.device)
    found = torch.searchsorted(total, wanted[:, None], right=True)[:, 0]
    # a number next to 1 may round to the whole sum, behind the last token that has any probability
    last = total.shape[-1] - 1 - (probabilities.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(found, last)


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores [B, V] of the tokens ``seen`` [B, V] bool divided by ``penalty`` where positive, multiplied where
    negative (arXiv 1909.05858). Unlike in a padded batch, padding is never among them."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
