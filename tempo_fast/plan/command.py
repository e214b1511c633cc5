"""``tempo-fast plan``: options to a question, and the plan told."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from tempo_fast.errors import InputError
from tempo_fast.files import write_json


def add_options(parser: argparse.ArgumentParser) -> None:
    """RECIPE and what the recipe does not say."""
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="YAML file, folder of a run, or a shipped recipe's name")
    add("--gpus", type=int, default=1, metavar="N", help="devices, one rank each (1)")
    add("--gpu", default="h100", help="h100, h800, h200, h20, b200, a100-80, a100-40, a800, l40s, rtx4090, cpu (h100)")
    add("--records", type=int, default=0, metavar="N", help="videos with pairs, of each r")
    add("--pairs", type=Path, metavar="PATH", help="file of pairs, or folder with r<r>.jsonl: lengths and numbers")
    add("--sft", type=int, default=0, metavar="N", help="records of SFT; counted in data.sft where it is there")
    add("--seconds", type=float, default=120.0, metavar="S", help="length of a video (120)")
    add("--size", default="1280x720", metavar="WxH", help="pixels of a video (1280x720)")
    add("--answer", type=float, default=300.0, metavar="TOKENS", help="tokens of an answer (300)")
    add("--words", type=int, default=60, metavar="TOKENS", help="tokens of a prompt beside its video (60)")
    add("--mfu", type=float, default=0.4, metavar="X", help="assumed share of the device's peak rate (0.4)")
    add("--price", type=float, default=0.0, metavar="USD", help="of a device and hour")
    add("--json", type=Path, metavar="FILE", help="write the plan there, in bytes and seconds")


def plan_command(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Print the plan. Raises InputError naming the option or the key."""
    for name, value, fits, wanted in (
        ("--gpus", args.gpus, args.gpus >= 1, "1 or more"),
        ("--records", args.records, args.records >= 0, "0 or more"),
        ("--sft", args.sft, args.sft >= 0, "0 or more"),
        ("--seconds", args.seconds, 0 < args.seconds < float("inf"), "above 0"),
        ("--answer", args.answer, 1 <= args.answer < float("inf"), "1 or more"),
        ("--words", args.words, args.words >= 0, "0 or more"),
        ("--mfu", args.mfu, 0 < args.mfu <= 1, "in (0, 1]"),
        ("--price", args.price, 0 <= args.price < float("inf"), "0 or more"),
    ):
        if not fits:
            raise InputError(f"tempo-fast plan: {name} must be {wanted}, got {value:g}")
    size = re.fullmatch(r"(\d+)x(\d+)", args.size)
    if not size or min(int(size[1]), int(size[2])) < 1:
        raise InputError(f"tempo-fast plan: --size is written as 1280x720, got {args.size!r}")
    from tempo_fast.configio import load_config
    from tempo_fast.plan.gpus import find_gpu
    from tempo_fast.plan.plan import Question, make_plan
    from tempo_fast.plan.text import as_json, as_text

    config = load_config(args.recipe, list(overrides))
    question = Question(
        gpu=find_gpu(args.gpu), gpus=args.gpus, records=args.records, sft=args.sft or _lines(config.data.sft),
        pairs=args.pairs, seconds=args.seconds, width=int(size[1]), height=int(size[2]), answer=args.answer,
        words=args.words, mfu=args.mfu, price=args.price,
    )  # fmt: skip
    plan = make_plan(config, question)
    if args.json:
        write_json(args.json, as_json(plan))
    print(as_text(plan))


def _lines(path: str) -> int:
    """Records of a file of JSON lines; 0 where it is not there."""
    if not path or not Path(path).is_file():
        return 0
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())
