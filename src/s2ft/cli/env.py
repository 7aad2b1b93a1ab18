"""`s2ft env`: what a bug report needs to say."""

import typer

from s2ft.cli.options import JsonFile
from s2ft.common.files import write_json
from s2ft.common.outputs import check_writable


def env(json_file: JsonFile = None) -> None:
    """Print versions, the machine and which extras are complete, for a bug report; no path or name of the machine is in it.

    Example: s2ft env --json env.json
    """
    check_writable(json_file)
    from s2ft.runtime.environment import report

    facts = report()
    lacks = {f"extra {name}": _state(packages) for name, packages in facts["extras"].items()}
    rows = {name: value for name, value in facts.items() if name != "extras"} | lacks
    width = max(map(len, rows))
    for name, value in rows.items():
        typer.echo(f"{name:<{width}}  {value}")
    if json_file is not None:
        write_json(json_file, facts, ensure_ascii=False)


def _state(missing: list[str]) -> str:
    return f"without {', '.join(missing)}" if missing else "complete"
