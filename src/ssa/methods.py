"""The methods and the selectors there are: the only lists of them. Imports no torch.

A layer's attention is a method, which says what is trained and what is added to the selected blocks, over a selector, which says how
blocks are chosen. `register_method` and `register_selector` add one. A package outside does that in a function (or a module) that it
names in its entry points of the group `ssa.methods`; it runs before the first list is read.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ssa.budget import AttentionMode
from ssa.errors import UserError, one_line

Streams = Literal["full", "sparse", "both"]
Marker = Literal["circle", "square", "triangle", "diamond", "down"]
OptionValue = bool | int | float | str
GROUP = "ssa.methods"
OTHER_COLOURS = ("#6b6f76", "#b0b6bf")


@dataclass(frozen=True)
class Option:
    """What a method or a selector can be told beyond the fields of every model."""

    default: OptionValue
    help: str


@dataclass(frozen=True)
class Method:
    """What is trained."""

    name: str
    label: str
    """In tables, as the paper writes it."""
    implementation: str
    """ "package.module:Class", an `ssa.attention.AttentionMethod`; imported when a model is built."""
    streams: Streams
    """What training computes: dense attention, sparse attention, or both, one of which goes on, drawn anew each step."""
    trained_with: str
    """For a model's card: it was trained with ..."""
    num_gates: int = 1
    """Gates of a token and query head: one for each branch."""
    main_gate: int = 0
    """Which of them is the selection's."""
    branches: tuple[str, ...] = ()
    """What it adds to the selected blocks, in every mode. Weights of other methods cannot become its own, or the other way round."""
    scopes: tuple[str, ...] = ("group", "head")
    """Who may choose."""
    colours: tuple[str, str] = OTHER_COLOURS
    """CSS, on light and on dark ground."""
    marker: Marker = "down"
    options: Mapping[str, Option] = field(default_factory=dict)

    @property
    def training_mode(self) -> AttentionMode:
        """The stream that training feeds on; with both streams it is drawn anew each step."""
        return "full" if self.streams == "full" else "sparse"

    @property
    def draws_stream(self) -> bool:
        return self.streams == "both"

    @property
    def full_notes(self) -> list[str]:
        """What a reader of full attention's figures has to know."""
        if not self.branches:
            return []
        kept = " and the ".join(self.branches)
        return [
            f"{self.name} has no full attention of its own: 'full' lets its selected branch read everything and keeps the {kept}"
        ]

    def load(self) -> type:
        return _load(self)


@dataclass(frozen=True)
class SelectorKind:
    """How blocks are chosen."""

    name: str
    label: str
    implementation: str
    """ "package.module:Class", an `ssa.attention.Selector`; imported when a model is built."""
    options: Mapping[str, Option] = field(default_factory=dict)

    def load(self) -> type:
        return _load(self)


_METHODS: dict[str, Method] = {}
_SELECTORS: dict[str, SelectorKind] = {}
_ALIASES: dict[str, tuple[str, str]] = {}


def register_method(method: Method) -> None:
    """Raises `UserError` for a name that is taken."""
    _register(_METHODS, method, (*_METHODS, *_ALIASES))


def register_selector(selector: SelectorKind) -> None:
    """Raises `UserError` for a name that is taken."""
    _register(_SELECTORS, selector, tuple(_SELECTORS))


def register_alias(name: str, method: str, selector: str) -> None:
    """`name`, read as a method's, means this method over this selector."""
    if name in _METHODS or name in _ALIASES:
        raise UserError(f"there is a method {name!r} already; register another name")
    _ALIASES[name] = (method, selector)


def unregister(name: str) -> None:
    """Takes a method, selector or alias off the lists, for tests."""
    for known in (_METHODS, _SELECTORS, _ALIASES):
        known.pop(name, None)


def _register(known: dict[str, Any], new: Method | SelectorKind, taken: tuple[str, ...]) -> None:
    if new.name in taken:
        raise UserError(f"there is a {type(new).__name__} {new.name!r} already; register another name")
    if not new.name.isidentifier():
        raise UserError(f"{new.name!r} is no name for a {type(new).__name__}; use letters, digits and _")
    known[new.name] = new


def methods() -> dict[str, Method]:
    """By name, those of other packages included."""
    _load_entry_points()
    return dict(_METHODS)


def selectors() -> dict[str, SelectorKind]:
    """By name, those of other packages included."""
    _load_entry_points()
    return dict(_SELECTORS)


def resolve_alias(method: str, selector: str | None = None) -> tuple[str, str]:
    """(method, selector) that a name in a recipe, a configuration or on the command line stands for.

    Raises:
        UserError: An alias with another selector than its own.
    """
    _load_entry_points()
    if not isinstance(method, str) or method not in _ALIASES:
        return method, selector or "means"
    meant, own = _ALIASES[method]
    if selector not in (None, "means", own):
        raise UserError(f"method {method} is {meant} over the selector {own}, not over {selector!r}; name one of them")
    return meant, own


def method_named(name: str, what: str = "method") -> Method:
    """Raises `UserError` that lists those there are."""
    return _named(methods(), name, what)


def selector_named(name: str, what: str = "selector") -> SelectorKind:
    """Raises `UserError` that lists those there are."""
    return _named(selectors(), name, what)


def _named(known: Mapping[str, Any], name: str, what: str) -> Any:
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{what} = {name!r} is not one of {', '.join(known)}; others come with the package that registers them")
    return known[name]


def full_name(method: str, selector: str = "means") -> str:
    """What records, tables and benchmarks call a method over a selector: "moba", "moba+eviction"."""
    return method if selector == "means" else f"{method}+{selector}"


def split_name(name: str) -> tuple[str, str]:
    """ "moba+eviction", "moba" or an alias -> (method, selector)."""
    method, _, selector = name.partition("+")
    return resolve_alias(method, selector or None)


def look_of(name: str) -> tuple[tuple[str, str], Marker]:
    """Colours (on light and on dark ground) and marker of the runs of a `full_name`; nobody's where the method is not registered here."""
    known = methods().get(name.partition("+")[0])
    return (known.colours, known.marker) if known else (OTHER_COLOURS, "down")


def full_notes(name: str) -> list[str]:
    """What a reader of full attention's figures of a `full_name` has to know."""
    known = methods().get(name.partition("+")[0])
    return known.full_notes if known else []


def label(name: str) -> str:
    """How the paper's tables call a `full_name`; what nobody registered here goes by its name."""
    method, _, selector = name.partition("+")
    known, over = methods().get(method), selectors().get(selector)
    shown = known.label if known else method
    return f"{shown} ({over.label if over else selector})" if selector else shown


def checked_options(entry: Method | SelectorKind, given: Mapping[str, Any] | None, what: str) -> dict[str, OptionValue]:
    """Every option of `entry`, those `given` in place of their defaults.

    Raises:
        UserError: One that it does not have, or of another type.
    """
    options = {name: option.default for name, option in entry.options.items()}
    for name, value in (given or {}).items():
        if name not in options:
            known = ", ".join(options) or "it has none"
            raise UserError(f"{what}.{name} is no option of {entry.name}: {known}")
        kind = type(options[name])
        if (kind is float and type(value) is int) or (kind is int and type(value) is float and value.is_integer()):
            value = kind(value)
        if type(value) is not kind:
            raise UserError(f"{what}.{name} = {value!r} is not {kind.__name__}")
        options[name] = value
    return options


def _load(entry: Method | SelectorKind) -> Any:
    module, _, name = entry.implementation.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{entry.name} cannot be loaded from {entry.implementation}: {one_line(str(error))}") from error


_loaded = False


def _load_entry_points() -> None:
    """Once a process; by a flag, which a compiled graph can look at."""
    global _loaded
    if _loaded:
        return
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            found = point.load()
            if callable(found):
                found()
        except Exception as error:
            raise UserError(
                f"the entry point {point.name} = {point.value} of {GROUP} does not work: {one_line(f'{type(error).__name__}: {error}')}; "
                "mend or uninstall its package"
            ) from error
    _loaded = True


register_method(
    Method(
        "full", "FullAttn", "ssa.attention.full:FullAttention", "full", "full attention",
        colours=("#2e6fb0", "#6fb1ee"), marker="circle",
    )
)  # fmt: skip
register_method(
    Method(
        "moba", "MoBA", "ssa.attention.moba:MoBA", "sparse",
        "sparse attention: every token reads its own block and the best others by mean-pooled keys",
        colours=("#b57400", "#f0b445"), marker="square",
    )
)  # fmt: skip
register_method(
    Method(
        "nsa", "NSA", "ssa.attention.nsa:NSA", "sparse", "three branches: compressed blocks, selected blocks, a sliding window",
        num_gates=3, main_gate=1, branches=("compression branch", "sliding window"), scopes=("group",),
        colours=("#00805d", "#3ccb9f"), marker="triangle",
    )
)  # fmt: skip
register_method(
    Method(
        "ssa", "SSA", "ssa.attention.ssa:SSA", "both",
        "sparse and full attention, one drawn at each step, with their outputs aligned at every layer",
        colours=("#c44f00", "#ff8a3d"), marker="diamond",
    )
)  # fmt: skip
register_selector(SelectorKind("means", "block means", "ssa.attention.selectors.means:MeansSelector"))
_WINDOWS = {
    "mean_size": Option(32, "keys of a window, whose mean key is scored"),
    "mean_stride": Option(16, "a window starts every so many keys"),
    "sink_blocks": Option(1, "first blocks of a document, which everybody reads"),
    "local_blocks": Option(16, "blocks right before a query's own, which it always reads"),
    "lse": Option("exact", "the scores' softmax is normalised over the windows (exact) or over coarser ones (coarse)"),
    "dense_length": Option(0, "queries at earlier positions read everything"),
}
register_selector(SelectorKind("windows", "windows", "ssa.attention.selectors.windows:WindowsSelector", _WINDOWS))
register_selector(
    SelectorKind(
        "eviction", "windows + importance", "ssa.attention.selectors.eviction:EvictionSelector",
        _WINDOWS | {
            "query_blocks": Option(15, "blocks chosen by query; the rest of the budget is chosen by importance"),
            "delta_bias": Option(False, "the importance's projection has a bias"),
            "eviction_loss_weight": Option(0.0, "weight of a loss that teaches the importance to rank blocks as attention does"),
            "eviction_loss_every": Option(64, "that loss looks at every so-many-th query of a row"),
        },
    )
)  # fmt: skip
register_alias("infllmv2", "moba", "windows")
register_alias("nosa", "moba", "eviction")
