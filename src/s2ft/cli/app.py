"""The command `s2ft`: subcommands, each in its own file, and the way errors leave.

Bad input, a full disk and the like end in one message on stderr and exit code 2; Ctrl-C in 130.
Heavy libraries are imported inside the commands.
"""

from __future__ import annotations

import errno
import io
import sys
from typing import Annotated

import typer

import s2ft
from s2ft.cli import bench, study, train
from s2ft.cli.codes import BAD_INPUT, INTERRUPTED
from s2ft.cli.eval import evaluate
from s2ft.cli.export import export
from s2ft.cli.fuse import fuse
from s2ft.cli.inspect import inspect
from s2ft.cli.merge import merge
from s2ft.cli.quickstart import quickstart
from s2ft.cli.reproduce import reproduce
from s2ft.common.errors import S2FTError, no_space

_OUTSIDE = {  # what is wrong with the machine, not with the program
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM", "ENAMETOOLONG", "EMFILE", "ENFILE")
}

app = typer.Typer(
    help="S²FT: fine-tune language models by structured sparsity, as a PEFT method.",
    no_args_is_help=True,
    add_completion=False,
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
app.command("train", help=train.HELP)(train.command)
app.command("eval")(evaluate)
app.command("reproduce")(reproduce)
app.command("inspect")(inspect)
app.command("fuse")(fuse)
app.command("export")(export)
app.command("merge")(merge)
app.add_typer(bench.app, name="bench")
app.add_typer(study.app, name="study")


def main() -> None:
    """The entry point."""
    _print_what_can_be_printed()
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except S2FTError as error:
        _leave(f"error: {error}", BAD_INPUT)
    except OSError as error:
        if error.errno not in _OUTSIDE:
            raise
        where = "" if error.filename is None else f": {str(error.filename)!r}"
        _leave(f"error: {no_space(error) or error.strerror}{where}", BAD_INPUT)
    except typer.Abort:  # Ctrl-C in older versions of typer; newer ones return 130 themselves
        _leave("interrupted", INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own usage errors have it; all else is a bug, shown in full
            raise
        _leave(f"error: {error.format_message()}", BAD_INPUT)


def _print_what_can_be_printed() -> None:
    """A character that the terminal's encoding lacks becomes a question mark, where it would end the command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _leave(message: str, code: int) -> None:
    print(_printable(message), file=sys.stderr)
    sys.exit(code)


def _printable(message: str) -> str:
    """Without control characters: names come from files, and a terminal would obey them."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1] for letter in message)


if __name__ == "__main__":
    main()
