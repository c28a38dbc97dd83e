"""Where metrics go besides RUN/metrics.jsonl: `train.track` names one of these, or none."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ssa.checked_json import read_json
from ssa.errors import UserError, one_line

PROJECT = "sparse-sparse-attention"
_PACKAGES = {"none": None, "tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Tracker(Protocol):
    """Takes numbers by name."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def open_tracker(track: str, run_dir: Path, start_step: int) -> Tracker | None:
    """The tracker of a run that starts (or goes on) after `start_step`; None for "none".

    tensorboard writes RUN/tensorboard. wandb and trackio get a new entry at each start, in the group of the run directory's name, with the
    run's recipe.json as its configuration, if it is there; where and as whom they log in is their own matter (`wandb login`,
    WANDB_MODE=offline).

    Raises:
        UserError: the package is not installed, or refuses.
    """
    check_tracker(track)
    opened: dict[str, Callable[[Path, int], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
    return opened[track](run_dir, start_step) if track in opened else None


def check_tracker(track: str) -> None:
    """Complain before a run has prepared, deleted or written anything.

    Raises:
        UserError: `track` is unknown, or its package is not installed.
    """
    if track not in _PACKAGES:
        raise UserError(f"train.track = {track!r} is not one of {', '.join(_PACKAGES)}")
    package = _PACKAGES[track]
    try:
        if package is not None:
            importlib.import_module(package)
    except ImportError:
        extra = "track" if track == "tensorboard" else track
        raise UserError(f'train.track = "{track}" needs {track}: pip install "{PROJECT}[{extra}]", or set it to none') from None


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """A line of metrics as names and numbers: {"kind": "train", "step": 3, "loss": 1.0} -> {"train/loss": 1.0}. Lists get a name an element;
    texts and what is missing are left out."""
    found: dict[str, float] = {}
    for name, value in line.items():
        values = {f"/{i:02}": v for i, v in enumerate(value)} if isinstance(value, list) else {"": value}
        for place, one in values.items():
            if isinstance(one, int | float) and name != "step":
                found[f"{line['kind']}/{name}{place}"] = float(one)
    return found


class _TensorBoard:
    def __init__(self, run_dir: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events of steps that are done again would be shown twice.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, start_step: int) -> None:
        import wandb

        name = _entry(run_dir, start_step)
        try:
            self._run = wandb.init(project=PROJECT, group=run_dir.name, name=name, dir=str(run_dir), config=_recipe(run_dir))
        except (wandb.Error, OSError) as error:
            raise UserError(f'train.track = "wandb" failed: {one_line(error)}; log in, or set WANDB_MODE=offline') from None
        self._step, self._values = -1, dict[str, float]()

    def write(self, step: int, values: dict[str, float]) -> None:
        # One entry a step: a step that is written again (a validation after its training line) would be dropped.
        if step != self._step:
            self._send()
        self._step = step
        self._values |= values

    def close(self) -> None:
        self._send()
        self._run.finish()

    def _send(self) -> None:
        if self._values:
            self._run.log(self._values, step=self._step)
        self._values = {}


class _Trackio:
    def __init__(self, run_dir: Path, start_step: int) -> None:
        import trackio

        self._run = trackio.init(project=PROJECT, group=run_dir.name, name=_entry(run_dir, start_step), config=_recipe(run_dir))

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def _entry(run_dir: Path, start_step: int) -> str:
    return f"{run_dir.name} from step {start_step}" if start_step else run_dir.name


def _recipe(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "recipe.json"
    return read_json(path) if path.is_file() else {}
