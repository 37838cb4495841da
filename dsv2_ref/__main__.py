# SPDX-License-Identifier: MIT
"""The command line: results as JSON or text on stdout, messages on stderr, exit code 2 for bad
input with one line that says what was wrong and what was expected."""

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from dsv2_ref import bench as benches

CORPORA = "python, packages, stories, hub:NAME or a path"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _add_train(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("train", help="train a preset")
    p.add_argument("--preset", default="small",
                   help="small, mini, tiny, the ladder's 10m, 50m, 150m, lite or v2; needle and "
                        "needle-gpu learn to find needles, and take --steps, --seed, --out alone")
    p.add_argument("--recipe", choices=("minutes", "10m", "50m", "150m", "lite", "v2"),
                   help="ours, the ladder's, or the paper's; the options below change it; default: "
                        "the preset's own on the ladder, else minutes")
    p.add_argument("--corpus", default="python", help=CORPORA)
    p.add_argument("--text-bytes", type=float, help="as 40e6; so much of it to train on, not all")
    p.add_argument("--out", default="build/train")
    p.add_argument("--resume", action="store_true", help="go on from the state in --out")
    length = p.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="default 300, or the ladder's")
    length.add_argument("--seconds", type=float)
    length.add_argument("--tokens", type=float, help="as 5e6; in whole steps of batch x sequence")
    p.add_argument("--optimizer", choices=("muon", "adamw", "adamw8"))
    p.add_argument("--weights", choices=("fp32", "bf16"), help="bf16: with adamw8 alone")
    p.add_argument("--schedule", choices=("linear", "step"))
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"))
    for name in ("lr", "warmup", "protected", "recompute"):
        p.add_argument(f"--{name}", type=float)
    for name in ("sequence", "batch", "seed", "micro-batch"):
        p.add_argument(f"--{name}", type=int)
    p.add_argument("--save-every", type=int, default=100, help="steps")
    p.add_argument("--evaluate-every", type=int, default=0, help="steps; 0 for at the end alone")
    p.add_argument("--no-save", dest="save", action="store_false", help="write the log alone")
    p.add_argument("--watch", choices=("tensorboard", "trackio"), help="beside log.jsonl")
    p.add_argument("--from", dest="source", metavar="FOLDER",
                   help="a saved model to go on from, with --extend")
    p.add_argument("--extend", type=float, metavar="S",
                   help="read S times as far with YaRN, and tune for 50 --steps at that length")
    p.add_argument("--quiet", dest="progress", action="store_false", help="no progress bar")


def _add_needle(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("needle", help="what a saved model finds in a long text")
    p.add_argument("model", metavar="MODEL", help="folder of a saved model, as data/needle")
    p.add_argument("--lengths", nargs="+", help="tokens, as 512 1024 or 128K; default: the longest "
                   "that the model has positions for")
    p.add_argument("--depths", nargs="+", help="per cent; default: 0 20 40 60 80 100")
    p.add_argument("--cache", choices=("latent", "six_bit"), default="latent")
    p.add_argument("--kind", choices=("one", "several", "chain"), default="one",
                   help="one needle, one of four, or x1 = 7, x2 = x1, x3 = x2: what is x3?")
    p.add_argument("--samples", type=int, default=8, help="needles of a cell")
    p.add_argument("--factor", type=float, help="YaRN's s; 1 is plain RoPE; default: the model's")
    p.add_argument("--corpus", default="stories", help="the haystack: " + CORPORA)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="build/needle", help="cells are kept here, so that a run that "
                   "was killed goes on")
    p.add_argument("--json", action="store_true", help="JSON, not a table")
    p.add_argument("--quiet", dest="progress", action="store_false", help="no progress bar")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dsv2_ref", description="DeepSeek-V2, exactly.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    p = commands.add_parser("run", help="the main job: train, judge, generate, draw, save")
    p.add_argument("--out", default="build")
    p.add_argument("--seconds", type=float, default=225.0,
                   help="for everything together; training gets at least 30 %%")
    p.add_argument("--corpus", default="python", help=CORPORA)

    p = commands.add_parser("paper", help="the paper's claims beside ours")
    p.add_argument("--json", action="store_true")

    _add_train(commands)

    p = commands.add_parser("figures", help="draw a run from its log.jsonl")
    p.add_argument("folder", metavar="RUN_FOLDER", help="pictures go to RUN_FOLDER/figures")

    p = commands.add_parser("generate", help="continue a prompt with a saved model")
    p.add_argument("--model", default="build/model")
    p.add_argument("--prompt", default="def")
    p.add_argument("--max-new-tokens", type=int, default=200)
    p.add_argument("--temperature", type=float, default=0.7)
    p.add_argument("--top-p", type=float, default=0.9)
    p.add_argument("--seed", type=int, default=0)

    _add_needle(commands)

    p = commands.add_parser("copy", help="lift a concept file into a folder of your own")
    p.add_argument("what", nargs="*", metavar="NAME DEST", help="rope, mla, routing, ...")
    p.add_argument("--list", action="store_true", help="the names there are")
    p.add_argument("--check", metavar="DEST",
                   help="what changed since, and whose change; exit code 1 if anything did")

    p = commands.add_parser("bench", help="a measurement against a peer in the same process")
    names = [m.name for m in pkgutil.iter_modules(benches.__path__) if not m.ispkg]
    p.add_argument("name", choices=names)
    p.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    p.add_argument("--only", metavar="STUDY", help="one study of ablations, as attention")
    p.add_argument("--json", action="store_true", help="on one line")
    return parser


def dispatch(args: dict) -> int | None:
    """Run a command; an exit code other than 0 where it has one."""
    command = args.pop("command")
    if command == "paper":
        from dsv2_ref import paper

        rows = paper.rows()
        print(paper.as_json(rows) if args["json"] else paper.as_table(rows))
        return
    if command == "bench":
        measure = importlib.import_module(f"dsv2_ref.bench.{args['name']}").run
        if args["only"] is not None and args["name"] != "ablations":
            raise ValueError(f"--only: {args['only']!r}, expected with ablations alone")
        options = {} if args["only"] is None else {"only": args["only"]}
        record = measure(quick=args["quick"], **options)
        print(json.dumps(record, indent=None if args["json"] else 2))
        return
    if command == "needle":
        from dsv2_ref.commands import needle

        show = needle.as_json if args.pop("json") else needle.as_table
        print(show(needle.needle_command(**args)))
        return
    if command == "copy":
        result = _copy(**args)
        print(json.dumps(result, indent=1))
        return int(isinstance(result, dict) and set(result.values()) != {"same"})   # drift
    if command == "train":
        from dsv2_ref.commands import long_context

        source, factor = args.pop("source"), args.pop("extend")
        if source is not None or factor is not None:
            print(json.dumps(long_context.extend_command(source, factor, **args)))
            return
        if args["preset"] in long_context.NEEDLE:
            print(json.dumps(long_context.needle_command(**args)))
            return
    from dsv2_ref.commands import draw, generate, run, train

    result = {"run": run.run, "train": train.train_command, "figures": draw.figures_command,
              "generate": generate.generate_command}[command](**args)
    print(json.dumps(result, ensure_ascii=False))


def _copy(what: Sequence[str], list: bool, check: str | None) -> object:
    from dsv2_ref import copying

    if list:
        return sorted(copying.concepts())
    if check is not None:
        return copying.check(check)
    if len(what) != 2:
        raise ValueError(f"copy: {' '.join(what) or 'nothing given'}, expected NAME DEST")
    return copying.copy(*what)


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(build_parser().parse_args(argv))
    try:
        return dispatch(args) or 0
    except (ValueError, ImportError) as error:
        print(f"dsv2_ref: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except FloatingPointError as error:        # training diverged
        print(f"dsv2_ref: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dsv2_ref: stopped; what was saved is whole", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
