"""From a verb's function to its command line, and back to the call to make. Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from types import GenericAlias
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from ssa.arguments import is_option, parse_arguments
from ssa.cli.inputs import CHECKS
from ssa.config import TABLES, load_recipe, recipe_flags
from ssa.errors import UserError

Verb = Callable[..., "int | None"]


def call_verb(verb: str, function: Verb, words: list[str]) -> int:
    """Run `function` with the arguments in `words`; returns its exit status.

    Raises:
        UserError: The words are no arguments of it, or it raised that itself: then parameters are called by their flags.
    """
    bound: dict[str, Any] = {}
    others: dict[str, bool] = {}
    if "overrides" in inspect.signature(function).parameters:
        bound["overrides"], words = split_overrides(words)
        others = recipe_flags()
    parameters = _parameters(function, bound)
    target = _deferred(function, parameters, bound)
    try:
        call = parse_arguments(target, words, f"ssa {verb}", _flags(parameters), others, repeatable=True)
    except SystemExit:  # --help has been printed
        if bound and words[0].startswith("-"):
            print(f"Fields of the recipe can be set too, e.g. --train.steps 100; `ssa {verb} CONFIG --help` lists them.")
        elif bound:
            with contextlib.suppress(SystemExit):
                load_recipe(words[0], ["--help"])
        return 0
    _check_given(function, parameters, call)
    try:
        return call() or 0
    except UserError as error:
        raise UserError(_with_flags(str(error), function)) from error


def _check_given(function: Verb, parameters: list[inspect.Parameter], call: functools.partial[int | None]) -> None:
    """Refuse what is not there, and '' for what has to be given: `ssa prepare "$TEXTS"` with no such variable would mean the current directory."""
    given = dict(zip((p.name for p in parameters), call.args, strict=False)) | call.keywords
    hints = get_type_hints(function, include_extras=True)
    for parameter in parameters:
        value = given.get(parameter.name)
        values = value if isinstance(value, tuple) else (value,)
        check = CHECKS.get(_metavar(hints[parameter.name], parameter.name, False)[1])
        if parameter.default is parameter.empty and "" in values:
            flag = parameter.name.replace("_", "-")
            name = flag.upper() if parameter.kind is parameter.POSITIONAL_ONLY else f"--{flag}"
            raise UserError(f"{name} is '' (a shell variable that is not set?)")
        if check:
            for one in filter(None, values):
                check(one)


def _with_flags(message: str, function: Verb) -> str:
    """The library's `max_tokens = 0` is `--max-tokens = 0` to who typed it, and `mode 'full'` at the start of a message `--mode 'full'`.

    A name of one word could be prose elsewhere.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY and p.name != "overrides"]
    if not names:
        return message
    anywhere = "|".join(name if "_" in name else f"{name}(?= = )" for name in names)
    first = "|".join(names)
    found = rf"(?<![\w.'\"/-])(?<!config\.json: )({anywhere})(?![\w./])|(?:^|(?<= and ))({first})(?= ['\[])"
    return re.sub(found, lambda name: "--" + (name[1] or name[2]).replace("_", "-"), message)


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(`--model.*`, `--data.*` and `--train.*` with their values, everything else), each in order."""
    overrides: list[str] = []
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        table, dot, name = word.removeprefix("--").partition("=")[0].partition(".")
        if not (word.startswith("--") and dot and table in TABLES):
            rest.append(word)
            continue
        overrides.append(word)
        if "=" not in word:
            count = _values_of(TABLES[table], name.replace("-", "_"), waiting)
            overrides += waiting[:count]
            del waiting[:count]
    return overrides, rest


def _values_of(table: type, name: str, waiting: list[str]) -> int:
    """How many words follow `--table.name`; an unknown field's own value is taken with it, so that one error names both."""
    kinds = {f.name: str(f.type) for f in dataclasses.fields(table)}
    kind = kinds.get(name, kinds.get(name.removeprefix("no_"), "")).partition("[")[0]
    most = {"bool": 0, "tuple": 2, "dict": len(waiting)}.get(kind, 1)  # dict: NAME VALUE NAME VALUE ...
    return next((i for i, word in enumerate(waiting[:most]) if is_option(word)), min(most, len(waiting)))


def _parameters(function: Verb, bound: dict[str, Any]) -> list[inspect.Parameter]:
    """Those that the command line gives, their types resolved and with the words that help shows for their values."""
    import tyro

    hints = get_type_hints(function, include_extras=True)
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in bound:
            plain, metavar = _metavar(hints[name], name, parameter.kind is parameter.POSITIONAL_ONLY)
            hint = Annotated[plain, tyro.conf.arg(metavar=metavar)] if metavar else plain
            parameters.append(parameter.replace(annotation=hint))
    return parameters


def _metavar(hint: Any, name: str, positional: bool) -> tuple[Any, str]:
    """The type without our words (see `ssa.cli.metavars`), and what help calls a value; "" leaves that to tyro."""
    if get_origin(hint) is Annotated:
        return get_args(hint)[0], get_args(hint)[1]
    if get_origin(hint) is tuple:
        plain, word = _metavar(get_args(hint)[0], name, positional)
        return GenericAlias(tuple, (plain, ...)), f"{word} [{word} ...]" if positional and word else word
    if get_origin(hint) is Literal and "" in get_args(hint):
        return hint, f"{{{','.join(filter(None, get_args(hint)))}}}"
    return hint, name.upper() if positional else ""


def _flags(parameters: list[inspect.Parameter]) -> dict[str, bool]:
    """Options, and whether a value follows."""
    flags: dict[str, bool] = {}
    for parameter in parameters:
        if parameter.kind is not parameter.POSITIONAL_ONLY:
            name, switch = parameter.name.replace("_", "-"), parameter.annotation is bool
            flags[f"--{name}"] = not switch
            if switch:
                flags[f"--no-{name}"] = False
    return flags


def _deferred(
    function: Verb, parameters: list[inspect.Parameter], bound: dict[str, Any]
) -> Callable[..., functools.partial[int | None]]:
    """`function` for tyro: with `parameters` only, and returning the call to make instead of making it.

    Parsing errors are caught around tyro; what the verb itself prints and raises must not be.
    """

    def defer(*args: Any, **keywords: Any) -> functools.partial[int | None]:
        return functools.partial(function, *args, **keywords, **bound)

    defer.__name__, defer.__doc__ = function.__name__, function.__doc__
    defer.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    defer.__annotations__ = {p.name: p.annotation for p in parameters}
    return defer
