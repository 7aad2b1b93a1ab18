"""The declared versions fit together: bounds, pinned sets, and what transformers wants of PEFT."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers.integrations import peft as interface

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [Requirement(need) for needs in PROJECT["optional-dependencies"].values() for need in needs]
NEEDED = {canonicalize_name(need.name): need for need in map(Requirement, PROJECT["dependencies"])}


def pinned(name: str) -> dict[str, Version]:
    found = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(), flags=re.M)
    return {canonicalize_name(package): Version(number) for package, number in found}


def lower_bound(need: Requirement) -> Version:
    return next(Version(part.version) for part in need.specifier if part.operator == ">=")


LOWEST, TESTED = pinned("constraints-lowest.txt"), pinned("constraints.txt")


def test_the_installed_peft_is_one_that_the_installed_transformers_takes() -> None:
    assert Version(version("peft")) >= Version(interface.MIN_PEFT_VERSION)


@pytest.mark.parametrize("name", NEEDED)
def test_every_lower_bound_is_in_the_lowest_set_and_the_tested_set_is_allowed(name: str) -> None:
    assert LOWEST[name] == lower_bound(NEEDED[name])
    assert NEEDED[name].specifier.contains(str(TESTED[name]))
    assert NEEDED[name].specifier.contains(version(name))


@pytest.mark.parametrize("need", [need for need in EXTRAS if canonicalize_name(need.name) in LOWEST], ids=str)
def test_the_lower_bound_of_an_extra_is_in_the_lowest_set_where_that_has_it(need: Requirement) -> None:
    assert LOWEST[canonicalize_name(need.name)] == lower_bound(need)


@pytest.mark.parametrize("need", [need for need in EXTRAS if canonicalize_name(need.name) in TESTED], ids=str)
def test_the_tested_version_of_an_extra_is_allowed(need: Requirement) -> None:
    assert need.specifier.contains(str(TESTED[canonicalize_name(need.name)]))


def test_the_lowest_set_has_nothing_that_is_not_declared() -> None:
    assert set(LOWEST) <= {*NEEDED, *(canonicalize_name(need.name) for need in EXTRAS)}


def test_no_transformers_is_allowed_that_wants_a_newer_peft_than_is_allowed() -> None:
    """Since 5.24 transformers refuses PEFT below 0.22; until we allow that one, we must not allow this one."""
    if not NEEDED["peft"].specifier.contains("0.22.0"):
        assert not NEEDED["transformers"].specifier.contains("5.24.0")
