"""Where the command `s2ft` starts.

`import s2ft` brings torch and PEFT, which take seconds; help and a misspelt option need neither. That this package is
loaded tells `s2ft` to leave both to the command that needs them.
"""

import sys


def main() -> None:
    """Runs the command line."""
    from s2ft.cli.leaving import leaving

    with leaving(sys.argv[1:]):
        from s2ft.cli.app import main as run  # needs typer

    run()
