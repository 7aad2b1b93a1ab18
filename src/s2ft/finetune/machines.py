"""Options of `s2ft plan`: a model, what of it is trained, and the devices, as in "8x80G"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field

from s2ft.finetune.values import Ratios
from s2ft.runtime.options import Count, Options

if TYPE_CHECKING:
    from s2ft.format.config import S2FTConfig

_GPUS = re.compile(r"(\d+)\s*[x×]\s*(\d+(?:\.\d+)?)\s*G(?:B)?", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """Equal devices."""

    devices: int
    bytes: float  # of each

    @classmethod
    def parse(cls, text: str) -> Machine:
        """Reads "8x80G"; G is 10⁹ bytes.

        Raises:
            ValueError: if it is written otherwise.

        Example:
            >>> Machine.parse("8x80G")
            Machine(devices=8, bytes=80000000000.0)
        """
        found = _GPUS.fullmatch(text.strip())
        if found is None or int(found[1]) < 1 or float(found[2]) <= 0:
            raise ValueError("must be a number of devices and the memory of each, such as 8x80G or 1x24G")
        return cls(int(found[1]), float(found[2]) * 1e9)


def _readable(text: str) -> str:
    Machine.parse(text)
    return text


class PlanOptions(Options):
    """All options of `s2ft plan`."""

    model: str = Field(description="Base model: a folder or a name on the Hub; only its configuration is read")
    gpus: Annotated[str, AfterValidator(_readable)] = Field(description="How many devices, and how large: 8x80G")
    ratios: Ratios = Field(
        None, description="As in s2ft train: fraction of heads or channels, or one for each projection"
    )
    budget: float | None = Field(None, description="Instead of ratios: fraction of the parameters; 0.01 if neither")
    max_length: Count = Field(2048, description="Tokens of a row")
    batch_size: Count | None = Field(
        None, description="Rows of a batch on each device; unless given, the most that fit"
    )

    @property
    def machine(self) -> Machine:
        """The devices."""
        return Machine.parse(self.gpus)

    def config(self) -> S2FTConfig:
        """What is trained; which channels does not matter here.

        Raises:
            S2FTError: if the method does not allow it.
        """
        from s2ft.format.config import S2FTConfig

        return S2FTConfig(ratios=self.ratios, budget=self.budget, seed=0, task_type="CAUSAL_LM")
