"""What every benchmark returns: environment, settings, rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from s2ft.runtime.environment import environment


@dataclass(frozen=True)
class Report:
    """A benchmark's result; `as_dict` is what `--json` writes."""

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    environment: dict[str, Any] = field(default_factory=environment)

    def as_dict(self) -> dict[str, Any]:
        """Environment, settings and rows."""
        return {"environment": self.environment, "settings": self.settings, "rows": self.rows}
