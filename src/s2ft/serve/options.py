"""Every option of `s2ft serve`, once: the command line, its help and the checks follow from here. Needs no heavy library."""

from __future__ import annotations

import ipaddress
import os.path
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from s2ft.common.errors import gathered
from s2ft.runtime.gguf import SUFFIX as GGUF
from s2ft.runtime.lookup import check_folder
from s2ft.runtime.options import Count, Options, one_of
from s2ft.serve.keys import KEYS, read_keys

ENGINES = ("s2ft", "vllm")
PRECISIONS = ("auto", "bf16", "fp32")


def _positive(value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError("must be more than 0")
    return value


def _port(value: int) -> int:
    if not 0 <= value <= 65535:
        raise ValueError("is no port; expected 0 (any that is free) to 65535")
    return value


Positive = Annotated[float, AfterValidator(_positive)]


class ServeOptions(Options):
    """All options of the server; `parse` looks for the files that they name."""

    model: str = Field(description="Base model: a folder, a .gguf file or a name on the Hub")
    adapters: Path | None = Field(None, description="Folder of adapter folders; their names are the models' names")
    name: str | None = Field(
        None,
        description="What clients call the base model; unless given: its folder's or file's name, or that on the Hub",
    )
    host: str = Field("127.0.0.1", description="Address to listen on; any other than this machine's own needs keys")
    port: Annotated[int, AfterValidator(_port)] = Field(8000, description="Port to listen on; 0 takes one that is free")
    keys: Path | None = Field(None, description=f"File of Bearer keys, one a line; unless given: ${KEYS}")
    precision: Annotated[str, one_of(*PRECISIONS)] = Field("auto", description=f"Of the base: {', '.join(PRECISIONS)}")
    rows: Count = Field(64, description="Answers that are written at once")
    queue: Annotated[int, Field(ge=0)] = Field(256, description="Answers that may wait for their turn; more get a 429")
    max_prompt: Count = Field(4096, description="Most tokens of a prompt")
    max_output: Count = Field(1024, description="Most tokens of an answer")
    max_body: Count = Field(1 << 20, description="Most bytes of a request")
    adapter_gb: Positive = Field(2.0, description="Room for adapters beside the model, in GB of their files")
    host_gb: Annotated[float, Field(ge=0)] = Field(8.0, description="Room for more of them in CPU memory, in GB")
    timeout: Positive = Field(300.0, description="Most seconds for a request, from its first byte to its last")
    drain: Positive = Field(30.0, description="Seconds for requests under way when the server is told to stop")
    allow_loading: bool = Field(
        False, description="Let clients add adapters of the folder, and take them away, at run time"
    )

    engine: Annotated[str, one_of(*ENGINES)] = Field(
        "s2ft", description="s2ft, or vllm where installed: its own server, with our plug-in"
    )
    vllm_options: str | None = Field(None, description="More options for vLLM, such as '--tensor-parallel-size 2'")

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine can reach it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def base_name(self) -> str:
        """What clients call the base model."""
        path = Path(os.path.abspath(self.model))  # a link in the Hub's cache leads to a hash
        if self.name or not path.exists():
            return self.name or self.model
        is_file = path.is_file() and path.suffix.lower() == GGUF  # a folder's name may hold a dot, as Qwen3-0.6B
        return path.stem if is_file else path.name

    def input_problems(self) -> list[str]:
        """A base or a folder that is not there, keys that cannot be read or are missing."""
        problems = gathered(lambda: check_folder(self.model)) if self.model else []
        if self.adapters is not None and not Path(self.adapters).is_dir():
            problems.append(f"adapters={str(self.adapters)!r} is no folder; name one that holds adapter folders")
        keys: list[str] = []
        problems += gathered(lambda: keys.extend(read_keys(None if self.keys is None else Path(self.keys))))
        if not self.is_local and not problems and not keys:
            problems.append(
                f"host={self.host!r} can be reached from other machines, so it needs keys: keys=FILE, or ${KEYS}"
            )
        if self.vllm_options is not None and self.engine == "s2ft":
            problems.append(f"vllm_options={self.vllm_options!r} needs engine='vllm'")
        return problems
