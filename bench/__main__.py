"""The command line of the benchmarks. Needs tempo_kernels: an installed tempo-fast, or the repository's root."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

KERNELS = Path(__file__).parents[1] / "kernels"
NAMES = {
    "head": "per-token log-prob and KL of the loss head, forward and backward",
    "step": "preference training steps: trees beside rows, with and without a live reference",
    "store": "the store of reference statistics: reading, opening, training steps, smaller forms",
    "video": "from a video file to the model's input, on every decoder, beside what other trainers use",
    "generate": "captions of videos: tokens and videos per second of the answer engines",
    "formats": "preference data through every format and back: losses, rows/s, memory, broken rows",
    "pairs": "preference pairs of videos whose events are known: shots, order, what can be told apart",
    "uneven": "ranks that train on records as unequal as they come: tokens per rank, no hang",
    "plan": "the memory that `tempo-fast plan` predicts, beside the peak of real trainings",
    "compile": "every configuration of the Triton kernels compiled without a GPU, and what it would use",
    "tune": "which tiles of the Triton kernels are fastest on this GPU",
    "gpu": "what to run in the minutes that a GPU is at hand: CUDA tests, then head at large shapes",
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else ""
    if name not in NAMES:
        listing = "\n".join(f"  {key}  {what}" for key, what in NAMES.items())
        asked = name in ("-h", "--help")
        print(
            f"usage: python -m bench NAME [options]\n{listing}" if asked
            else f"bench: {'no name given' if not name else f'no benchmark {name!r}'}; there are:\n{listing}",
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    try:
        importlib.import_module("tempo_kernels")
    except ImportError:
        sys.path.insert(0, str(KERNELS))
    return int(importlib.import_module(f"bench.{name}").main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())
