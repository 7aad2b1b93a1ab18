"""Structured sparse fine-tuning (S²FT) for language models, as a PEFT method.

Importing this package makes PEFT and transformers know the method `S2FT`; `README.md` maps the modules.
"""

from s2ft.adapter.export import export
from s2ft.adapter.fusion import fuse
from s2ft.adapter.switching import switch
from s2ft.errors import S2FTError
from s2ft.method.config import S2FTConfig
from s2ft.method.digest import any_base
from s2ft.method.in_place import in_place
from s2ft.method.registration import register
from s2ft.method.selection import Selection, select
from s2ft.method.tuner import S2FTModel

__all__ = [
    "S2FTConfig",
    "S2FTError",
    "S2FTModel",
    "Selection",
    "any_base",
    "export",
    "fuse",
    "in_place",
    "select",
    "switch",
]

register(S2FTConfig, S2FTModel)
