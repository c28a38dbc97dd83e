"""Runs tests/border on other releases than the environment's: those that differ go into an overlay, which stands before it on the path.

    python tests/border/overlay.py oldest       # the lower bound of every tested window
    python tests/border/overlay.py newest       # the newest release within each
    python tests/border/overlay.py released     # the newest release of everything, whatever the windows say; more tests

torch stays as it is: most of its builds bring gigabytes of CUDA libraries. An overlay that differs in nothing is not run again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path

from ssa.doctor import requirements, tested_windows

TESTS = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
ALONE = "triton"
"""Installed without regard to others: torch's own builds ask for one release of it, but the interpreter that runs here is not torch's."""

KERNELS = ["ops/test_triton.py", "ops/test_compile_targets.py"]
MORE = ["model", "infer"]


def wanted(end: str) -> list[str]:
    """What to ask pip for."""
    windows = {name: window for name, window in tested_windows().items() if name != "torch"}
    if end == "oldest":
        oldest = [f"{name}=={window.split(',')[0].removeprefix('>=')}" for name, window in windows.items()]
        return [*oldest, "numpy<2.4"]  # with a later one Triton 3.6's interpreter fails
    if end == "newest":
        return [f"{name}{window}" for name, window in windows.items()]
    names = {requirement.name for requirement in chain(*requirements().values()) if "==" not in str(requirement.specifier)}
    return [name for name in sorted(names - {"torch"}) if _installed(name)]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def differing(asked: list[str], *options: str) -> list[str]:
    """["name==release"] of what pip would change in this environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        subprocess.run([*PIP, "--dry-run", "--upgrade", "--report", report, *options, *asked], check=True)
        found = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    return [f"{entry['name']}=={entry['version']}" for entry in found]


def make_overlay(end: str) -> Path | None:
    """The directory with what differs at this end; None if nothing does."""
    directory = Path(sys.prefix, "borders", end)
    asked = wanted(end)
    eager = ["--upgrade-strategy", "eager"] if end == "released" else []
    pins = differing([f"torch=={version('torch')}", *(ask for ask in asked if not ask.startswith(ALONE))], *eager)
    pins += differing([ask for ask in asked if ask.startswith(ALONE)], "--no-deps") if _installed(ALONE) else []
    print(f"{end}: {' '.join(sorted(pins)) or 'what is installed'}", flush=True)
    stamp = directory / "pins.txt"
    if pins and not (stamp.exists() and stamp.read_text() == "\n".join(pins)):
        shutil.rmtree(directory, ignore_errors=True)
        subprocess.run([*PIP, "--no-deps", "--target", directory, *pins], check=True)
        stamp.write_text("\n".join(pins))
    return directory if pins else None


def main(ends: list[str]) -> int:
    """Run the ends one after the other; pytest's status of the first that fails."""
    for end in ends:
        overlay = make_overlay(end)
        if overlay is None:
            print(f"{end}: nothing differs, so `make test` has run these tests")
            continue
        paths = [str(overlay), *filter(None, [os.environ.get("PYTHONPATH")])]
        tests = ["border", *KERNELS, *(MORE if end == "released" else [])]
        command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", *(str(TESTS / name) for name in tests)]
        if status := subprocess.run(
            command, cwd=TESTS.parent, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        ).returncode:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
