"""The templates in `page/`, and what they share. What is put into one is escaped, so that no model's text runs as code."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader

from s2ft.evaluate.tally import percent
from s2ft.report.charts import number


def render(template: str, **values: Any) -> str:
    """The page that `page/TEMPLATE` makes of `values`, its styles inside."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    loader = PackageLoader("s2ft.report", "page")
    found = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    found.filters |= {"number": number, "duration": duration, "percent": percent}
    found.globals["styles"] = "".join(
        (files(f"s2ft.{folder}") / "page" / "page.css").read_text(encoding="utf-8") for folder in ("serve", "report")
    )
    return found


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(7.25), duration(200), duration(7200)
        ('7.2 s', '3.3 min', '2.0 h')
    """
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
