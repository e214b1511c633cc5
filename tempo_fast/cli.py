"""The commands: ``tempo-fast VERB ...``.

Exit codes: 0 done, 2 bad input (one sentence on stderr), 130 interrupted, 75 preempted; both of the latter can be
resumed with the same command. Anything else is a bug of ours and shows its traceback.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tempo_fast import __version__
from tempo_fast.errors import InputError, Interrupted
from tempo_fast.imports import held_signals
from tempo_fast.runs import STEPS

_CONFIG_VERBS = {
    "run": "all steps: curate, pairs, reference, train, eval, report; finished ones are skipped",
    "curate": "find shots, groups and clips in data.videos",
    "pairs": "caption the clips and write chosen and rejected answers",
    "reference": "compute the reference's statistics of every answer",
    "train": "the preference stages, then SFT",
    "eval": "temporal probes on held-out videos",
    "report": "write report.html from the files of a run",
}
_PLAIN_VERBS = {
    "merge": "fold an adapter into its base model",
    "pairs convert": "preference data from one format to another: TRL, ms-swift, LLaMA-Factory, RRPO, Parquet, ...",
    "plan": "memory, time and cost of a recipe on so many GPUs, before anything is started",
    "reference ls": "what a store of reference statistics holds, and when it was last used",
    "reference verify": "read every shard of a store, and name the damaged ones",
    "reference gc": "drop what a store no longer needs, and merge its small shards",
    "scan": "probe every video of a folder, before a long run meets a broken one",
    "tinyworld": "generate the small world of the demo, or rebuild its base model",
    "doctor": "versions, devices, decoders, and what is missing for what",
}


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors as one sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    words = [a for a in args if a != "--debug"]
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "urllib3", "filelock", "pyscenedetect", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not debug:
        warnings.filterwarnings("ignore", category=FutureWarning)  # other libraries' news for their programmers
    try:
        with _terminable():
            _dispatch(words)
        return 0
    except InputError as e:
        return _fail(str(e), 2, debug)
    except Interrupted as e:
        return _fail(_how_to_resume(str(e), words, e.resumable), e.exit_code, debug)
    except (KeyboardInterrupt, _Terminated) as e:
        what, code = ("terminated", 75) if isinstance(e, _Terminated) else ("interrupted", 130)
        resumable = bool(words) and words[0] in _CONFIG_VERBS and " ".join(words[:2]) not in _PLAIN_VERBS
        what += "; finished work is kept, resume with" if resumable else ""
        return _fail(_how_to_resume(what, words, resumable), code, debug)
    except BrokenPipeError:
        # the reader of our output went away (`tempo-fast scan | head`); nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"tempo-fast: {message}", file=sys.stderr)
    return code


def _how_to_resume(what: str, words: Sequence[str], resumable: bool) -> str:
    if not resumable:
        return f"{what}; nothing half-written is left, start it again"
    return f"{what}: tempo-fast {shlex.join(word for word in words if word != '--fresh')}"


class _Terminated(BaseException):
    """SIGTERM where nobody else waits for it. Not an Exception, which libraries catch while they import others."""


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(words: list[str]) -> None:
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help", "help"):
        print(_overview())
    elif verb in ("-V", "--version"):
        print(f"tempo-fast {__version__}")
    elif (both := " ".join(words[:2])) in _PLAIN_VERBS:
        _PLAIN[both](words[2:])
    elif verb in _CONFIG_VERBS:
        _config_verb(verb, words[1:])
    elif verb in _PLAIN_VERBS:
        _PLAIN[verb](words[1:])
    else:
        known = [*_CONFIG_VERBS, *_PLAIN_VERBS]
        near = max(known, key=lambda name: difflib.SequenceMatcher(None, verb, name).ratio())
        raise InputError(f"{verb}: no such command; the nearest is {near}, and --help lists all")


def _overview() -> str:
    from tempo_fast.configio import shipped_recipes

    rows = [f"  {name:<16} {text}" for name, text in {**_CONFIG_VERBS, **_PLAIN_VERBS}.items()]
    return "\n".join(
        [
            "tempo-fast: preference training that teaches video LLMs when things happen",
            "",
            "usage: tempo-fast VERB RECIPE [--key.sub value ...]     (the first seven)",
            "       tempo-fast VERB --help",
            "",
            *rows,
            "",
            f"A recipe is a YAML file, the folder of an earlier run, or one of: {', '.join(shipped_recipes())}.",
            "--debug shows tracebacks. Exit codes: 0 done, 2 bad input, 130 interrupted, 75 preempted.",
        ]
    )


def _config_verb(verb: str, words: list[str]) -> None:
    recipe, overrides, until, wants_help = _split(verb, words)
    from tempo_fast.configio import describe_keys, load_config, shipped_recipes

    if wants_help:
        options = " [--until STEP]" if verb == "run" else ""
        print(f"usage: tempo-fast {verb} RECIPE{options} [--debug] [--key.sub value ...]\n\n{_CONFIG_VERBS[verb]}.\n")
        print(f"RECIPE: a YAML file, the folder of an earlier run, or one of {', '.join(shipped_recipes())}.")
        if options:
            print(f"--until: stop after one of {', '.join(STEPS)}.")
        print(
            f"\nKeys, with the values of {recipe} in brackets:"
            if recipe
            else "\nKeys, with their defaults in brackets:"
        )
        print("Sections are overridden key by key, lists whole or by entry: --train.stages.0.epochs 2\n")
        print(describe_keys(load_config(recipe, overrides) if recipe else None))
        return
    if recipe is None:
        raise InputError(f"tempo-fast {verb} needs a recipe: a YAML file, or one of {', '.join(shipped_recipes())}")
    config = load_config(recipe, overrides)
    with held_signals():
        from tempo_fast import pipeline

    result = pipeline.run(config, until=until) if verb == "run" else pipeline.run_steps(config, [verb])
    if int(os.environ.get("RANK", "0")) == 0:
        from tempo_fast.report.text import describe_result

        print(describe_result(verb, Path(config.output_dir), result))


def _split(verb: str, words: list[str]) -> tuple[str | None, list[str], str | None, bool]:
    """(recipe, overrides, until, help asked for); the recipe may stand anywhere."""
    recipe: str | None = None
    overrides: list[str] = []
    until: str | None = None
    wants_help = False
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            wants_help = True
        elif word == "--until" or word.startswith("--until="):
            until = word.partition("=")[2] or (rest.pop(0) if rest else "")
            if verb != "run" or until not in STEPS:
                raise InputError(f"--until: run alone takes it, and it is one of {', '.join(STEPS)}, got {until!r}")
        elif word.startswith("--"):
            overrides.append(word)
            if "=" not in word and rest and not rest[0].startswith("--"):
                overrides.append(rest.pop(0))
        elif recipe is None:
            recipe = word
        else:
            raise InputError(
                f"{word}: unexpected word; the recipe is {recipe}, and overrides are written --key.sub value"
            )
    return recipe, overrides, until, wants_help


def _merge(words: list[str]) -> None:
    parser = _Parser("tempo-fast merge", description=_PLAIN_VERBS["merge"])
    parser.add_argument("adapter", type=Path, help="folder with adapter_config.json")
    parser.add_argument("out", type=Path, help="folder to write; from_pretrained, vLLM and lmms-eval load it")
    parser.add_argument("--base", default="", help="base model, where adapter_config.json does not name the right one")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    args = parser.parse_args(words)
    from tempo_fast.files import read_json

    settings = args.adapter / "adapter_config.json"
    base = args.base or read_json(settings).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{settings}: base_model_name_or_path is empty; name the base model with --base")
    if args.out.exists() and any(args.out.iterdir()) and not args.force:
        raise InputError(f"{args.out}: exists and is not empty; --force replaces it")
    from tempo_fast.training.adapters import merge_lora

    errors = merge_lora(
        base, args.adapter, args.out, device=args.device, note={"base": base, "adapter": str(args.adapter)}
    )
    print(
        f"{args.out}: merged {args.adapter} into {base}; rounding changes a weight by at most"
        f" {errors['max_rounding_error']:.1e} ({errors['max_relative_error']:.1e} of it) and the adapter's update by"
        f" {100 * errors['update_error']:.1f} %"
    )


def _convert(words: list[str]) -> None:
    from tempo_fast.pairs.formats.layouts import FORMATS

    parser = _Parser("tempo-fast pairs convert", description=_PLAIN_VERBS["pairs convert"], allow_abbrev=False)
    parser.add_argument("source", metavar="IN", help="JSON lines, JSON array, Parquet, Arrow, a pattern, or a folder")
    parser.add_argument(
        "out", metavar="OUT",
        help=".jsonl, .json (either with .gz), .parquet, or a new folder that Hugging Face's load_dataset takes",
    )  # fmt: skip
    formats = ("auto", *FORMATS)
    parser.add_argument("--from", dest="read_as", choices=formats, default="auto", help="format of IN (auto)")
    parser.add_argument("--to", dest="write_as", choices=FORMATS, default="native", help="format of OUT (native)")
    parser.add_argument("--r", type=int, default=0, metavar="N", help="difficulty of rows that do not say theirs (0)")
    parser.add_argument("--problems", type=Path, metavar="FILE.jsonl", help="write every problem there, not only 20")
    parser.add_argument("--strict", action="store_true", help="any problem is an error, and OUT is not written")
    parser.add_argument(
        "--group", choices=("all", "adjacent"), default="all",
        help="join rows of one video, prompt and chosen answer to one record: all (default), or neighbours only",
    )  # fmt: skip
    args = parser.parse_args(words)
    from tempo_fast.pairs.convert import ConvertOptions, convert_command

    options = ConvertOptions(
        read_as=args.read_as, write_as=args.write_as, r=args.r, problems=args.problems, strict=args.strict,
        group=args.group,
    )  # fmt: skip
    convert_command(args.source, args.out, options)


def _plan(words: list[str]) -> None:
    from tempo_fast.plan.command import add_options, plan_command

    parser = _Parser("tempo-fast plan", description=_PLAIN_VERBS["plan"], allow_abbrev=False)
    add_options(parser)
    plan_command(*parser.parse_known_args(words))


def _store_parser(verb: str) -> _Parser:
    parser = _Parser(f"tempo-fast {verb}", description=_PLAIN_VERBS[verb], allow_abbrev=False)
    parser.add_argument("store", type=Path, help="reference.store, <output_dir>/reference, or one reference's folder")
    return parser


def _reference_ls(words: list[str]) -> None:
    args = _store_parser("reference ls").parse_args(words)
    from tempo_fast.reference.command import ls_command

    ls_command(args.store)


def _reference_verify(words: list[str]) -> None:
    args = _store_parser("reference verify").parse_args(words)
    from tempo_fast.reference.command import verify_command

    verify_command(args.store)


def _reference_gc(words: list[str]) -> None:
    parser = _store_parser("reference gc")
    parser.add_argument("--keep", type=float, metavar="DAYS", help="drop what was not used for so many days")
    parser.add_argument("--max-gib", type=float, metavar="N", help="drop the least recently used beyond so many GiB")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    args = parser.parse_args(words)
    for option, value in (("--keep", args.keep), ("--max-gib", args.max_gib)):
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"tempo-fast reference gc: {option} must be a number of at least 0, got {value:g}")
    from tempo_fast.reference.command import gc_command

    gc_command(args.store, keep_days=args.keep, max_gib=args.max_gib, dry_run=args.dry_run)


def _scan(words: list[str]) -> None:
    parser = _Parser("tempo-fast scan", description=_PLAIN_VERBS["scan"], allow_abbrev=False)
    parser.add_argument("videos", help="folder, glob, text file with one path a line, or JSON lines that name videos")
    parser.add_argument("--out", "--json", type=Path, metavar="FILE.jsonl", help="keep one JSON object a video")
    parser.add_argument("--fresh", action="store_true", help="scan again what FILE.jsonl already holds")
    parser.add_argument("--recipe", default="", help="recipe whose video section decides frames and tokens")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes; 0 is one per core (0)")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds that one file may take (60)")
    parser.add_argument(
        "--decode", choices=("none", "sampled", "all"), default="sampled",
        help="none; some of the sampled frames and the last (default); all frames, which finds damage in the middle",
    )  # fmt: skip
    parser.add_argument("--no-decode", "--quick", dest="decode", action="store_const", const="none", help="as none")
    parser.add_argument("--fix", type=Path, metavar="DIR", help="write repaired copies, and videos.txt, into DIR")
    parser.add_argument("--gop", type=int, default=48, metavar="N", help="keyframe interval of re-encoded copies (48)")
    parser.add_argument("--max-gop", type=int, default=250, metavar="N", help="re-encode beyond this interval (250)")
    args, overrides = parser.parse_known_args(words)
    for option, value, fits, wanted in (
        ("--workers", args.workers, args.workers >= 0, "at least 0"),
        ("--timeout", args.timeout, 0 < args.timeout < float("inf"), "a number of seconds over 0"),
        ("--gop", args.gop, args.gop >= 1, "at least 1"),
        ("--max-gop", args.max_gop, args.max_gop >= args.gop, f"at least --gop ({args.gop})"),
    ):
        if not fits:
            raise InputError(f"tempo-fast scan: {option} must be {wanted}, got {value:g}")
    from tempo_fast.scan.command import Options, scan_command

    options = Options(
        out=args.out, fresh=args.fresh, workers=args.workers, timeout_s=args.timeout, decode=args.decode, fix=args.fix,
        gop=args.gop, max_gop=args.max_gop,
    )  # fmt: skip
    scan_command(args.videos, options, recipe=args.recipe, overrides=overrides)


def _tinyworld(words: list[str]) -> None:
    parser = _Parser("tempo-fast tinyworld", description=_PLAIN_VERBS["tinyworld"])
    parser.add_argument("out", nargs="?", type=Path, help="folder; runs/tinyworld, or the package's own base model")
    parser.add_argument("--train", type=int, default=40, help="training videos (40)")
    parser.add_argument("--heldout", type=int, default=16, help="held-out videos (16)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (0)")
    parser.add_argument("--rebuild", action="store_true", help="train the base model anew from the seed")
    args = parser.parse_args(words)
    if args.train < 0 or args.heldout < 0:
        raise InputError("tempo-fast tinyworld: --train and --heldout must not be negative")
    from tempo_fast.runtime.progress import progress

    if args.rebuild:
        from tempo_fast.tinyworld.base import BASE_DIR, rebuild

        card = rebuild(args.out or BASE_DIR, seed=args.seed)
        print(f"{args.out or BASE_DIR}: {card['parameters']} parameters, {card['seconds']} s")
        return
    from tempo_fast.tinyworld.generate import generate_world

    out = args.out or Path("runs/tinyworld")
    manifest = generate_world(
        out, args.seed, args.train, args.heldout, progress=lambda jobs: progress(jobs, "tinyworld", "video")
    )
    print(f"{out}: {args.train} training and {args.heldout} held-out videos, digest {manifest['digest'][:12]}")


def _doctor(words: list[str]) -> None:
    _Parser("tempo-fast doctor", description=_PLAIN_VERBS["doctor"]).parse_args(words)
    from tempo_fast.doctor import examine

    print(examine())


_PLAIN: dict[str, Callable[[list[str]], None]] = {
    "merge": _merge,
    "pairs convert": _convert,
    "plan": _plan,
    "reference ls": _reference_ls,
    "reference verify": _reference_verify,
    "reference gc": _reference_gc,
    "scan": _scan,
    "tinyworld": _tinyworld,
    "doctor": _doctor,
}
