"""What is imported is declared, in the core or in an extra; and the declared versions fit together."""

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers.integrations import peft as interface

from source import FOLDERS, MODULES, SOURCE, libraries

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [Requirement(need) for needs in PROJECT["optional-dependencies"].values() for need in needs]


def brought(extra: str) -> Iterator[Requirement]:
    """What an extra brings, and those that it names."""
    for need in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if need.name == "s2ft":
            for inner in need.extras:
                yield from brought(inner)
        else:
            yield need


CORE = {canonicalize_name(need.name): need for need in map(Requirement, PROJECT["dependencies"])}
NEEDED = {**CORE, **{canonicalize_name(need.name): need for need in (*brought("train"), *brought("lab"))}}


def pinned(name: str) -> dict[str, Version]:
    found = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(), flags=re.M)
    return {canonicalize_name(package): Version(number) for package, number in found}


def lower_bound(need: Requirement) -> Version:
    return next(Version(part.version) for part in need.specifier if part.operator == ">=")


LOWEST, TESTED = pinned("constraints-lowest.txt"), pinned("constraints.txt")
EXTRA_OF = {
    "evaluate": "eval",
    "lab": "lab",
    "cli": "train",
    "data": "train",
    "demo": "train",
    "finetune": "train",
    "report": "train",
    "runtime": "train",
    "serve": "serve",
}
OPTIONAL = {  # libraries that a folder does without; the code asks whether they are there, or says which extra brings them
    "common": {"matplotlib": "lab"},
    "adapters": {"matplotlib": "lab"},
    "exports": {"gguf": "gguf", "vllm": None},  # vLLM loads our plug-in, not the other way round
    "layer": {"triton": "gpu", "deepspeed": None},  # parameters that DeepSpeed holds are there only with it
    "training": {"liger-kernel": "liger"},
    "finetune": {"galore-torch": "baselines", "deepspeed": None, "wandb": None},
    "evaluate": {"vllm": None},
    "runtime": {"torchao": None},  # a base is quantised by what its user has
    "lab": {"liger-kernel": "liger", "deepspeed": None, "bitsandbytes": None},
}


@pytest.mark.parametrize("folder", [path for path in FOLDERS if path.parent == SOURCE], ids=lambda path: path.name)
def test_what_a_folder_imports_is_in_the_core_or_in_its_extra(folder: Path) -> None:
    extra, optional = EXTRA_OF.get(folder.name), OPTIONAL.get(folder.name, {})
    known = {*CORE, *optional, *(canonicalize_name(need.name) for need in (brought(extra) if extra else ()))}
    outside = {name for path in folder.rglob("*.py") for name in libraries(path)}
    assert outside - known == set()
    assert optional.keys() <= outside
    for name, bringer in optional.items():
        assert bringer is None or name in {canonicalize_name(need.name) for need in brought(bringer)}


def test_every_library_of_the_core_and_of_training_is_imported() -> None:
    assert {*CORE, *(need.name for need in brought("train"))} <= {name for path in MODULES for name in libraries(path)}


def test_all_is_every_extra_that_needs_no_gpu() -> None:
    rest = {"baselines", "liger", "gpu", "docs", "dev", "all"}
    wanted = {need.name for extra in PROJECT["optional-dependencies"].keys() - rest for need in brought(extra)}
    assert {need.name for need in brought("all")} == wanted


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


def test_every_file_beside_the_code_is_in_the_wheel() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = {
        path
        for package, patterns in tool["package-data"].items()
        for pattern in patterns
        for path in (ROOT / "src" / package.replace(".", "/")).glob(pattern)
    }
    files = [path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert [path for path in files if path.suffix != ".py" and path not in packed] == []
