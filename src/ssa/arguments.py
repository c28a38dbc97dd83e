"""Command lines to values through tyro, with errors of one line that name what was typed. Imports no torch.

tyro says what is wrong in a drawn box of 80 columns. What can be known beforehand (options that do not exist) is checked here; of the box
only the fixed words and the flag are read, and the value is taken from the command line itself, which no box has broken.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from ssa.errors import UserError

_BAD_CHOICE = re.compile(r"invalid choice .* for argument '(\S+)'\. Expected one of \((.*)\)\.")
_NO_VALUE = re.compile(r"Missing value for argument '(\S+)'\. Expected (\d+) values\.")
_BAD_VALUE = re.compile(r"Error parsing (--\S+): .* Argument helptext: --\S+ (INT|FLOAT FLOAT|FLOAT|\[STR FLOAT)\b")
_KINDS = {
    "INT": "a whole number",
    "FLOAT": "a number",
    "FLOAT FLOAT": "two numbers",
    "[STR FLOAT": "a list NAME NUMBER NAME NUMBER ...",
}
_MISSING = re.compile(r"Missing from .*?: (.*)")


def parse_arguments(
    target: Any, arguments: list[str], prog: str, flags: Mapping[str, bool], others: Iterable[str] = (), *,
    repeatable: bool = False, default: Any = None,
) -> Any:  # fmt: skip
    """`target`, a function or dataclass, called with what `arguments` say; `--help` prints and raises `SystemExit(0)`.

    Args:
        prog: The words before the arguments, as messages name them.
        flags: Every option that `target` has ("--save-every", "--no-resume"), and whether it takes a value.
        others: Options that are right elsewhere on the same command line, to suggest them.
        repeatable: Options that take many values are given once for each, `--prompt A --prompt B`.
        default: Of a dataclass: its fields' values where nothing is said.

    Raises:
        UserError: The arguments do not fit, or `target` raised it.
    """
    import tyro

    _check_options(arguments, prog, flags, others)
    keywords: dict[str, Any] = {} if default is None else {"default": default}
    if repeatable:
        keywords["config"] = (tyro.conf.UseAppendAction,)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            value, left = tyro.cli(target, args=arguments, prog=prog, return_unknown_args=True, **keywords)
    except SystemExit as stop:
        if not stop.code:
            raise
        if isinstance(stop.__context__, UserError):  # the target's own words
            raise stop.__context__ from None
        raise UserError(_told(" ".join(_unboxed(said.getvalue())), arguments, prog)) from None
    if left:
        raise UserError(f"{left[0]!r} is one argument too many; `{prog} --help` shows what there may be")
    return value


def is_option(word: str) -> bool:
    """Whether tyro refuses `word` as a value: -5 is one, -x and --anything are not."""
    return re.match(r"--?[A-Za-z]", word) is not None


def _check_options(arguments: list[str], prog: str, flags: Mapping[str, bool], others: Iterable[str]) -> None:
    before = ""
    for word in arguments:
        typed, given, value = word.partition("=")
        name = typed.replace("_", "-")
        expected, before = flags.get(before, False), name if not given else ""
        if expected or not is_option(word) or name in ("-h", "--help"):
            continue
        if name not in flags:
            near = _nearest(name, [*flags, *others])
            hint = f"did you mean {near}?" if near else f"`{prog} --help` lists what there is"
            raise UserError(f"unknown option {typed}; {hint}")
        if given and not flags[name]:
            raise UserError(f"{name} takes no value, but has {value!r}; write {name} alone, or {_opposite(name)}")


def _opposite(flag: str) -> str:
    """--train.compile and --train.no-compile."""
    table, dot, name = flag.removeprefix("--").rpartition(".")
    return f"--{table}{dot}{name.removeprefix('no-') if name.startswith('no-') else f'no-{name}'}"


def _nearest(name: str, known: list[str]) -> str:
    """The flag of the same last part, else the one that looks most alike."""
    last = name.lstrip("-").rpartition(".")[2]
    same = [flag for flag in known if flag.lstrip("-").rpartition(".")[2] == last]
    by_name = {flag.lstrip("-"): flag for flag in known}
    by_last = {flag.rpartition(".")[2]: flag for flag in by_name}
    near = difflib.get_close_matches(name.lstrip("-"), by_name, n=1) or [
        by_last[one] for one in difflib.get_close_matches(last, by_last, n=1)
    ]
    return same[0] if same else by_name[near[0]] if near else ""


def _unboxed(box: str) -> list[str]:
    """The words of tyro's box but for its title, rulers and last line; where the terminal has no UTF-8 it has rulers of - and no sides."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in box.splitlines()]
    inside = [line.strip("│╰╯ ") for line in lines[1:]]
    words = " ".join(line for line in inside if line.strip("─-")).split("For full helptext", 1)[0].split()
    return words or ["the arguments cannot be read"]


def _told(text: str, arguments: list[str], prog: str) -> str:
    """Our words for what tyro's `text` says about `arguments`."""
    if found := _BAD_CHOICE.fullmatch(text):
        choices = [choice for choice in re.findall(r"'(.*?)'", found[2]) if choice]
        return f"{found[1]} {_given(found[1], arguments)} is not one of {', '.join(choices)}"
    if found := _NO_VALUE.fullmatch(text):
        flag, count = found[1], int(found[2])
        if not flag.startswith("--"):
            return f"{prog} needs {flag.upper()}; `{prog} --help` explains it"
        hint = f"`{prog} --help` explains it"
        if any(name == flag and is_option(value) for name, value in pairwise(arguments)):
            hint = f"one that begins with - is written {flag}=VALUE"
        return f"{flag} needs {'a value' if count == 1 else f'{count} values'}; {hint}"
    if found := _BAD_VALUE.match(text):
        return f"{found[1]} {_given(found[1], arguments)} is not {_KINDS[found[2]]}"
    if found := _MISSING.fullmatch(text):
        missing = re.findall(r"(--\S+ \S+|\S+) (.*?)\.? \(required\)", found[1])
        return f"{prog} needs {'; '.join(f'{name}: {explained}' for name, explained in missing) or found[1]}"
    return text


def _given(flag: str, arguments: list[str]) -> str:
    """What was typed for `flag` the last time, quoted."""
    values: list[str] = []
    taking = False
    for word in arguments:
        name, given, value = word.partition("=")
        if is_option(word):
            taking = name.replace("_", "-") == flag
            if taking:
                values = [value] if given else []
        elif taking:
            values.append(word)
    return repr(" ".join(values))
