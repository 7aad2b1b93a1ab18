"""The file of `s2ft train --config` as a JSON schema, for editors: completion, help and marks under what is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from s2ft.finetune.methods import METHODS
from s2ft.finetune.objectives import OBJECTIVES
from s2ft.finetune.options import TrainOptions
from s2ft.finetune.peft_methods import PREFIX
from s2ft.format.terms import ALLOCATIONS, PROJECTIONS, STRATEGIES, SUBSETS

_CHOICES: dict[str, Iterable[str]] = {  # of options whose type is any text, since their names come from tables
    "method": METHODS,
    "objective": OBJECTIVES,
    "strategy": STRATEGIES,
    "subset": SUBSETS,
    "allocation": ALLOCATIONS,
}
_FRACTION = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_RATIOS = [
    _FRACTION,
    {"type": "object", "propertyNames": {"enum": list(PROJECTIONS)}, "additionalProperties": _FRACTION},
]


def config_schema() -> dict[str, Any]:
    """Every option with its description, its default and what it may be.

    None is required, since flags may give the rest. What depends on several options at once, on the data or on the model is
    left to `s2ft train`.
    """
    schema = TrainOptions.model_json_schema()
    del schema["required"]
    properties = schema["properties"]
    for name, names in _CHOICES.items():
        _kinds(properties[name])[0]["enum"] = list(names)
    properties["ratios"]["anyOf"] = [*_RATIOS, {"type": "null"}]
    properties["method"]["anyOf"] = [{"enum": properties["method"].pop("enum")}, {"pattern": f"^{PREFIX}"}]
    for rules in properties.values():
        _also_as_text(rules)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "s2ft train --config"}


def _kinds(rules: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of an option; where there is one, what says so."""
    kinds: list[dict[str, Any]] = rules.get("anyOf", [rules])
    return kinds


def _also_as_text(rules: dict[str, Any]) -> None:
    """Lists and mappings may be typed as on the command line: "a,b", "o_proj=0.1,down_proj=0.05"."""
    types = [kind.get("type") for kind in _kinds(rules)]
    if not {"array", "object"} & set(types) or "string" in types:
        return
    if "anyOf" not in rules:
        rules["anyOf"] = [{key: rules.pop(key) for key in ("type", "items", "additionalProperties") if key in rules}]
    rules["anyOf"].append({"type": "string"})
