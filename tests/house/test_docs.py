"""What the pages name exists: links and their anchors, options, modules and functions."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import s2ft
from s2ft.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "examples" / "README.md"]
TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what was, too
OF_OTHERS = {"--multi_gpu", "--num_processes", "--num_machines", "--mixed_precision", "--dynamo_backend"}  # accelerate
OF_OTHERS |= {"--config_file"}  # accelerate, too
OF_OTHERS |= {"--enable-lora", "--max-lora-rank", "--max-loras", "--tensor-parallel-size"}  # vLLM
OF_OTHERS |= {"--weight-transfer-config", "--lora-backend"}  # vLLM, SGLang
OF_OTHERS |= {"--model_args", "--tasks", "--help"}  # the lm-evaluation-harness, and every command's


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if target.startswith("https:"):
            continue
        file = page.parent / target if target else page
        assert file.is_file(), f"{link}: mkdocs links files alone"
        assert not anchor or anchor in headings(file), link


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TODAY, ids=lambda path: path.stem)
def test_every_option_exists(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text(encoding="utf-8")))
    assert named - options(get_command(app)) - OF_OTHERS == set()


def options(command: Any) -> set[str]:  # a click.Command, or typer's
    found = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return found.union(*map(options, getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("page", TODAY, ids=lambda path: path.stem)
def test_every_name_in_the_package_exists(page: Path) -> None:
    for name in set(re.findall(r"(?<![\w/-])s2ft(?:\.\w+)+", page.read_text(encoding="utf-8"))):
        home, _, last = name.rpartition(".")
        assert hasattr(import_module(home), last) or import_module(name), name


def test_the_api_page_lists_what_is_public() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: s2ft\.(\w+)$", page, flags=re.MULTILINE)) == sorted(s2ft.__all__)
