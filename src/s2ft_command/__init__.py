"""Where the command `s2ft` starts.

`import s2ft` brings torch and PEFT, which take seconds; help and a misspelt option need neither. That this package is
loaded tells `s2ft` to leave both to the command that needs them.
"""


def main() -> None:
    """Runs the command line."""
    from s2ft.cli.app import main as run

    run()
