"""`s2ft serve --engine vllm`: vLLM's own server, which finds the folder's adapters through our plug-in.

For those who outgrow one process: paged memory, tensor parallelism, GPUs. The API is vLLM's, which is OpenAI's too.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from s2ft.adapters.file import AdapterFile, open_adapter
from s2ft.common.errors import S2FTError, raise_together
from s2ft.exports.vllm import max_lora_rank, problems
from s2ft.exports.vllm_plugin import ROOT, adapter_folder
from s2ft.serve.adapters import name_problems
from s2ft.serve.keys import read_keys
from s2ft.serve.options import ServeOptions

SERVER = "vllm.entrypoints.openai.api_server"
MOST_AT_ONCE = 16  # adapters in one of vLLM's batches on a GPU; it reserves memory for each
_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}
_TAKEN = {"model", "adapters", "name", "host", "port", "keys", "precision", "rows", "engine", "vllm_options"}


def run(options: ServeOptions) -> None:
    """Becomes vLLM's server; does not return.

    Raises:
        S2FTError: as `check`, and with every adapter that vLLM cannot serve, or that has the base's name.
    """
    check(options)
    os.execve(sys.executable, command(options), {**os.environ, **environment(options)})


def check(options: ServeOptions) -> None:
    """Raises `S2FTError` if vLLM is not installed, or does not take the options."""
    if find_spec("vllm") is None:
        raise S2FTError("engine='vllm' needs vLLM, which is not installed: pip install vllm; or take engine='s2ft'")
    raise_together(_option_problems(options))


def command(options: ServeOptions) -> list[str]:
    """What is run.

    Raises:
        S2FTError: with every adapter that vLLM cannot serve, or that has the base's name.
    """
    given = {
        "--model": options.model,
        "--served-model-name": options.base_name,
        "--host": options.host,
        "--port": str(options.port),
        "--dtype": _DTYPES[options.precision],
        "--max-num-seqs": str(options.rows),
    }
    found = {} if options.adapters is None else dict(_adapters(options.adapters))
    if found:
        unserved = (f"{one.name}: {problem}" for one in found.values() for problem in problems(one))
        raise_together([*name_problems(options.base_name, found), *unserved])
        given["--max-lora-rank"] = str(max(max_lora_rank(one) or 0 for one in found.values()))
        given["--max-loras"] = str(_slots(len(found)))
    lora = ["--enable-lora"] * bool(found)
    more = shlex.split(options.vllm_options or "")
    return [sys.executable, "-m", SERVER, *lora, *(word for pair in given.items() for word in pair), *more]


def environment(options: ServeOptions) -> dict[str, str]:
    """Where the plug-in looks, and the key; on the command line every user of the machine could read it."""
    found: dict[str, str] = {}
    if options.adapters is not None:
        found |= {ROOT: str(options.adapters.resolve()), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    if keys := read_keys(options.keys):
        found["VLLM_API_KEY"] = keys[0]
    return found


def _slots(adapters: int) -> int:
    """How many adapters one of vLLM's batches may have.

    On a CPU one more than there are, however many: vLLM 0.32 gives rows without an adapter the last slot's there.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = accelerator is None or accelerator.type == "mps"  # vLLM leaves Apple's unused
    return adapters + 1 if on_cpu else min(adapters + 1, MOST_AT_ONCE)


def _adapters(root: Path) -> Iterator[tuple[str, AdapterFile]]:
    for path in sorted(root.iterdir()):
        if not path.name.startswith(".") and (folder := adapter_folder(root, path.name)) is not None:
            yield path.name, open_adapter(folder)


def _option_problems(options: ServeOptions) -> Iterator[str]:
    for name in sorted(options.model_fields_set - _TAKEN):
        yield f"{name} belongs to engine='s2ft'; vLLM has options of its own"
    if len(read_keys(options.keys)) > 1:
        yield "engine='vllm' takes one key"
    try:
        shlex.split(options.vllm_options or "")
    except ValueError as error:  # a quote that stays open, a backslash at the end
        yield f"vllm_options={options.vllm_options!r} cannot be divided into words ({error}); expected such as '--seed 3'"
