"""constraints.txt, which `make lock` writes and `make setup` installs."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def asked(project, extra, environment):
    """What the extra and the project itself ask for, extras of its own included."""
    for requirement in map(Requirement, project["dependencies"] + project["optional-dependencies"][extra]):
        if requirement.name == project["name"]:
            for inner in requirement.extras:
                yield from asked(project, inner, environment)
        elif requirement.marker is None or requirement.marker.evaluate(environment):
            yield requirement


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("system", [("linux", "Linux"), ("darwin", "Darwin"), ("win32", "Windows")])
def test_it_pins_all_that_the_project_asks_for_within_the_bounds(python, system):
    environment = {"python_version": python, "python_full_version": f"{python}.2"}
    environment |= dict(zip(("sys_platform", "platform_system"), system, strict=True))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text and "/" not in text  # no place, here or elsewhere
    pins = {}
    for pin in map(Requirement, (line for line in text.splitlines() if not line.startswith("#"))):
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pins.setdefault(pin.name, pin) is pin, f"{pin.name} twice"
    for requirement in asked(project, "dev", environment):
        (bound,) = pins[requirement.name].specifier
        assert bound.operator == "==" and requirement.specifier.contains(bound.version), f"{requirement}: make lock"
