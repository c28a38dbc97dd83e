"""The command line: `ssa VERB ...`. To add a verb, write a function and put it into `VERBS`.

A verb's parameters become its arguments (positional-only ones positional) and its docstring its help, through tyro; it returns its exit
status or None for 0. Whatever is slow to import (torch!) is imported inside. A verb with a keyword-only `overrides` also takes
recipe fields, `--train.steps 300`, and gets them there for `ssa.config.load_recipe`.
"""

from __future__ import annotations

import atexit
import difflib
import inspect
import os
import signal
import sys
from collections.abc import Iterable

from ssa import __version__
from ssa.bench.commands import bench_decode, bench_kernels, bench_plot, bench_prefill, bench_train
from ssa.cli.call import Verb, call_verb
from ssa.cli.measuring import analyze, evaluate, report, tune_budget
from ssa.cli.models import chat, convert, doctor, generate
from ssa.cli.training import demo, prepare, train
from ssa.errors import UserError, described
from ssa.terminal import named_output, open_standard_streams, tell

VERBS: dict[str, Verb] = {
    "demo": demo,
    "prepare": prepare,
    "train": train,
    "eval": evaluate,
    "analyze": analyze,
    "tune-budget": tune_budget,
    "report": report,
    "generate": generate,
    "chat": chat,
    "convert": convert,
    "bench kernels": bench_kernels,
    "bench decode": bench_decode,
    "bench prefill": bench_prefill,
    "bench train": bench_train,
    "bench plot": bench_plot,
    "doctor": doctor,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 fine, 2 bad input, 130 interrupted, else what the verb says.

    Files that cannot be read or written and memory that is not there are told in a line like bad input. Any other exception is a bug and is
    raised; with SSA_DEBUG set in the environment, all of them are.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # Read when torch loads its OpenMP: threads that wait by spinning slow down tenfold as soon as another program wants their core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    open_standard_streams()
    try:
        with named_output():
            return _dispatch(arguments)
    except KeyboardInterrupt:
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C, while others clean up, is no traceback
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader (head, less) is gone
        return 128 + signal.SIGPIPE
    except Exception as error:
        told = str(error) if isinstance(error, UserError) else described(error)
        if told is None or os.environ.get("SSA_DEBUG"):
            raise
        hint = "" if isinstance(error, UserError) else " (SSA_DEBUG=1 shows where)"
        tell(f"ssa: error: {told}{hint}")
        return 2


def _dispatch(arguments: list[str]) -> int:
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if verb == "--version":
        print(f"ssa {__version__}")
        return 0
    if family := [name for name in VERBS if name.startswith(f"{verb} ")]:
        if rest[:1] in ([], ["-h"], ["--help"]):
            print(_overview(family))
            return 0
        verb, rest = f"{verb} {rest[0]}", rest[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        raise UserError(f"no verb {verb!r}; {hint}")
    return call_verb(verb, VERBS[verb], rest)


def _overview(names: Iterable[str] = ()) -> str:
    """Of all verbs, or of these."""
    verbs = {name: function for name, function in VERBS.items() if name in (names or VERBS)}
    width = max(map(len, verbs))
    lines = [f"  {name:<{width}}  {inspect.getdoc(function).splitlines()[0]}" for name, function in verbs.items()]  # type: ignore[union-attr]
    return "\n".join(
        ["usage: ssa VERB ...", "", "Language models with natively trainable sparse attention.", "", *lines, "",
         "`ssa VERB --help` explains a verb; `ssa --version` prints the version. SSA_DEBUG=1 shows where an error came from."]
    )  # fmt: skip
