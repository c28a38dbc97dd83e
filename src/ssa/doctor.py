"""`ssa doctor`: what is installed, whether it is what is tested, what will be used and why, and whether a tiny model works."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import shlex
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console

from ssa import __version__, terminal

PROJECT = "sparse-sparse-attention"


def examine() -> int:
    """Print the report; 0 if everything in it works, 1 if not. A release that is not tested is named, with the cure, and is no failure."""
    console = terminal.console(highlight=False, markup=False, soft_wrap=True)
    healthy = True
    for title, section in (
        ("versions", _versions),
        ("devices", _devices),
        ("implementations", _implementations),
        ("extras", _extras),
    ):
        console.print(title)
        healthy &= _attempt(console, "", section)
    console.print("smoke test (a tiny SSA model)")
    for device in _test_devices() if healthy else ():
        for name, test in SMOKE_TESTS.items():
            healthy &= _attempt(console, f"{device}: {name}: ", test, device)
    verdict = "all well" if healthy else "something is broken: see FAILED above"
    console.print(verdict + (", on releases that are not tested: see the versions" if untested() else ""))
    return 0 if healthy else 1


def _attempt(console: Console, what: str, action: Callable[..., list[str] | None], *arguments: str) -> bool:
    """Print what `action` finds, or how it fails; whether it worked."""
    try:
        for line in action(*arguments) or ["ok"]:
            console.print(f"  {what}{line}")
        return True
    except Exception as error:  # whatever breaks is the finding
        console.print(f"  {what}FAILED: {type(error).__name__}: {error}")
        console.print("".join(traceback.format_tb(error.__traceback__)[-2:]).rstrip())
        return False


def requirements() -> dict[str, list[Requirement]]:
    """What the installed project asks for on this system, by extra ("" = always); empty if it runs without being installed."""
    found: dict[str, list[Requirement]] = defaultdict(list)
    try:
        project = importlib.metadata.metadata(PROJECT)
    except importlib.metadata.PackageNotFoundError:
        return found
    for requirement in map(Requirement, project.get_all("Requires-Dist", [])):
        for extra in ("", *project.get_all("Provides-Extra", [])):
            if requirement.name != PROJECT and (requirement.marker is None or requirement.marker.evaluate({"extra": extra})):
                found[extra].append(requirement)
                break
    return found


def tested_windows() -> dict[str, str]:
    """{"transformers": ">=5.17,<5.25", ...}: whatever has both bounds."""
    windows = {}
    for requirement in itertools.chain(*requirements().values()):
        bounds = sorted(map(str, requirement.specifier), reverse=True)
        if [bound[0] for bound in bounds] == [">", "<"]:
            windows[requirement.name] = ",".join(bounds)
    return windows


def untested() -> dict[str, str]:
    """The windows of what is installed in a release outside."""
    return {
        name: window
        for name, window in tested_windows().items()
        if (installed := _version(name)) and not SpecifierSet(window).contains(installed, prereleases=True)
    }


def _versions() -> list[str]:
    lines = [f"ssa {__version__}", f"python {platform.python_version()} on {platform.platform()}"]
    outside = untested()
    for package in dict.fromkeys(
        ["torch", "transformers", "triton", "numpy", "safetensors", "tokenizers", "tyro", "rich", *outside]
    ):
        verdict = f": not tested, {outside[package]} is" if package in outside else ""
        lines.append(f"{package} {_version(package) or 'not installed'}{verdict}")
    if outside:
        cure = " ".join(f'"{name}{window}"' for name, window in outside.items())
        lines.append(f"for tested releases: {shlex.quote(sys.executable)} -m pip install {cure}")
    if not requirements():
        lines.append("ssa is not installed, it runs from its sources: which releases are tested is unknown (pip install -e .)")
    return lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    lines = [f"cpu: {os.cpu_count()} cores, PyTorch uses {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        memory = properties.total_memory / 2**30
        lines.append(f"cuda:{i}: {properties.name}, {memory:.1f} GiB, capability {properties.major}.{properties.minor}, {bf16}")
    if not torch.cuda.is_available():
        built = (
            f"PyTorch is built for CUDA {torch.version.cuda}, but no GPU answers"
            if torch.version.cuda
            else "PyTorch is built without it"
        )
        lines.append(f"cuda: none ({built})")
    return lines


def _implementations() -> list[str]:
    from ssa.ops import chosen_implementation

    lines = []
    for device in _test_devices():
        name, reason = chosen_implementation(device)
        lines.append(f"{device}: block_sparse_attention, select_blocks: {name} ({reason})")
        lines.append(f"{device}: dense_attention: PyTorch's scaled_dot_product_attention")
    return lines


def _extras() -> list[str]:
    lines = []
    for extra in sorted(requirements().keys() - {"", "dev"}):
        packages = [requirement.name for requirement in requirements()[extra]]
        missing = [name for name in packages if _version(name) is None]
        if missing:
            lines.append(f'{extra}: {", ".join(missing)} missing: pip install "sparse-sparse-attention[{extra}]"')
        else:
            lines.append(f"{extra}: {', '.join(f'{name} {_version(name)}' for name in packages)}")
    return lines


def _test_devices() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _tiny_model(device: str, rows: int, length: int) -> tuple[Any, Any]:
    """A seeded model, and token ids [rows, length]."""
    import torch

    from ssa.testing import tiny_model

    return tiny_model().to(device), torch.arange(rows * length, device=device).reshape(rows, length) * 7 % 256


def _train_both_streams(device: str) -> None:
    """Loss and gradients under either stream are finite, and both alignment losses are there."""
    model, ids = _tiny_model(device, 2, 20)
    model.train()
    for stream in ("full", "sparse"):
        model.zero_grad()
        output = model(ids, labels=ids, stream=stream)
        output.loss.backward()
        values = [
            output.loss,
            output.sparsity_loss,
            output.commitment_loss,
            *(p.grad for p in model.parameters() if p.grad is not None),
        ]
        if not all(value.isfinite().all() for value in values):
            raise ArithmeticError(f"stream {stream}: loss {output.loss.item()} or a gradient is not finite")


def _generate_with_cache(device: str) -> None:
    """Greedy decoding gives the same tokens with the cache as without, in both modes."""
    model, ids = _tiny_model(device, 1, 18)
    for mode in ("full", "sparse"):
        model.config.attention_mode = mode
        runs = [
            model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cached, eos_token_id=None).tolist()
            for cached in (True, False)
        ]
        if runs[0] != runs[1]:
            raise ArithmeticError(f"{mode} attention: with the cache {runs[0][0][18:]}, without {runs[1][0][18:]}")


SMOKE_TESTS: dict[str, Callable[[str], None]] = {
    "training step under both streams": _train_both_streams,
    "generation with the cache equals generation without": _generate_with_cache,
}
