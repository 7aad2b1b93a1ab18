"""The command `s2ft`: its subcommands, each in a file of its own, which imports heavy libraries when it runs."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import s2ft
from s2ft.cli import bench, compare, data, eval, plan, reproduce, serve, study, train
from s2ft.cli.base import base
from s2ft.cli.config_schema import config_schema
from s2ft.cli.env import env
from s2ft.cli.export import export
from s2ft.cli.fuse import fuse
from s2ft.cli.inspect import inspect
from s2ft.cli.leaving import INTERRUPTED, as_flags, leave, leaving
from s2ft.cli.merge import merge
from s2ft.cli.quickstart import quickstart
from s2ft.cli.quickstart_real import quickstart_real

app = typer.Typer(
    help="S²FT: fine-tune language models by structured sparsity, as a PEFT method.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"s2ft {s2ft.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command("quickstart")(quickstart)
app.command("quickstart-real")(quickstart_real)
app.command("base")(base)
app.command("env")(env)
app.command("config-schema")(config_schema)
app.command("train", help=train.HELP)(train.command)
app.command("plan", help=plan.HELP)(plan.command)
app.command("eval", help=eval.HELP)(eval.evaluate)
app.command("compare", help=compare.HELP)(compare.command)
app.command("serve", help=serve.HELP)(serve.serve)
app.command("reproduce", help=reproduce.HELP)(reproduce.reproduce)
app.command("inspect")(inspect)
app.command("fuse")(fuse)
app.command("export")(export)
app.command("merge")(merge)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(study.app, name="study")


def main() -> None:
    """The entry point."""
    _print_what_can_be_printed()
    words = sys.argv[1:]
    with leaving(words, lambda message: as_flags(message, flags(words))):
        try:
            sys.exit(app(standalone_mode=False) or 0)
        except typer.Abort:  # Ctrl-C in older versions of typer; newer ones return 130 themselves
            leave("interrupted", INTERRUPTED)


def flags(words: Sequence[str]) -> dict[str, str]:
    """Python's argument → option, of the command that `words` name.

    Example:
        >>> flags(["merge", "my-adapter"])["output"]
        '--output'
    """
    command = typer.main.get_command(app)
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
    options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
    found = {option[2:].replace("-", "_"): option for option in options}
    return {"model": "--base", **found} if "base" in found else found


def _print_what_can_be_printed() -> None:
    """A character that the terminal's encoding lacks becomes a question mark, where it would end the command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


if __name__ == "__main__":
    main()
