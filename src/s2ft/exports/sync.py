"""`sync`: one adapter into the weights of a running vLLM engine, and out again; only its slices are sent.

    vllm serve BASE --weight-transfer-config '{"backend": "s2ft"}'      s2ft.sync("http://localhost:8000", "adapter")
    LLM(BASE, weight_transfer_config={"backend": "s2ft"})               s2ft.sync(llm, "adapter");  s2ft.sync(llm, None)

The engine runs the merged model then, without an adapter: no cost per token, no limit of rank. For each slice go its channels,
its new values and, the first time, the base's own, which the engine copies back when the adapter leaves. The other end:
exports/vllm_weights.py, which vLLM knows by our plug-in.
"""

from __future__ import annotations

import base64
import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor

from s2ft.adapters.checkpoint import Checkpoint, open_base
from s2ft.adapters.file import AdapterFile, open_adapter
from s2ft.adapters.merge import merged_rows
from s2ft.adapters.stored import Place
from s2ft.common.errors import S2FTError, first_line, raise_together
from s2ft.exports.patch import problems

BACKEND = "s2ft"  # of vLLM's weight transfer
WAIT = 600.0  # seconds for an answer of the engine


class Engine(Protocol):
    """What `vllm.LLM` has for it."""

    def start_weight_update(self) -> Any:
        """Begins."""

    def update_weights(self, request: Any) -> Any:
        """Takes {"update_info": ...}."""

    def finish_weight_update(self) -> Any:
        """Ends."""

    def reset_prefix_cache(self) -> Any:
        """Forgets what other weights computed."""


@dataclass(frozen=True)
class Synced:
    """What was sent."""

    tensors: int
    parameters: int  # that the adapter changes
    bytes: int  # channels and values, as they are before base64
    merged_bytes: int  # what sending each changed tensor whole would take


@dataclass(frozen=True, eq=False)
class Sent:
    """The part of a slice that lies in one tensor of the checkpoint."""

    place: Place
    values: Tensor  # [n, across], in the tensor's dtype
    own: Tensor | None  # the base's, shaped like `values`; None: the engine has them


def sync(engine: str | Engine, adapter: str | Path | None, base: str | None = None, key: str | None = None) -> Synced:
    """Puts an adapter into the weights of a running vLLM engine, in place of the one that it holds; None: the base alone.

    Requests that are under way are answered before. Afterwards the engine answers as the merged model (`s2ft merge`) does,
    without an adapter, for every request; without one it has the base's weights, bit for bit.

    Args:
        engine: A `vllm.LLM`, or the address of a server.
        adapter: Folder of an S²FT adapter.
        base: Folder or Hub name of its base, in safetensors; by default the one that the adapter names.
        key: The server's key, if it has one.

    Raises:
        S2FTError: before anything is sent, if the adapter is damaged, for another base, or holds more than slices of linear
            layers; or what the engine says when it does not take it.
    """
    return send(engine, [] if adapter is None else _slices(open_adapter(adapter), base), key)


def send(engine: str | Engine, slices: Sequence[Sent], key: str | None = None) -> Synced:
    """Sends slices; see `sync`."""
    tensors = _message(slices)
    where = {one.place.tensor: {"across": one.place.across, "shape": list(one.place.shape)} for one in slices}
    info = {"tensors": base64.b64encode(save(tensors)).decode() if tensors else "", "slices": where}
    try:
        if isinstance(engine, str):
            _post_all(engine.rstrip("/").removesuffix("/v1"), info, key)
        else:
            engine.start_weight_update()
            engine.update_weights({"update_info": info})
            engine.finish_weight_update()
            engine.reset_prefix_cache()
    except Exception as error:  # vLLM's own, of many kinds
        if isinstance(error, S2FTError):
            raise
        raise S2FTError(f"the engine does not take the slices: {first_line(error)}. {_HELP}") from error
    return sizes(slices)


def sizes(slices: Sequence[Sent]) -> Synced:
    """What `send` sends for these slices; they need no values (device meta)."""
    changed = sum(one.values.numel() for one in slices)
    whole = sum(math.prod(one.place.shape) * one.values.itemsize for one in slices)
    return Synced(len(slices), changed, sum(tensor.nbytes for tensor in _message(slices).values()), whole)


def _message(slices: Sequence[Sent]) -> dict[str, Tensor]:
    return {f"{one.place.tensor}.{part}": tensor for one in slices for part, tensor in _parts(one)}


_HELP = (
    f"It needs s2ft in its environment, and weight_transfer_config={{'backend': '{BACKEND}'}}; a server also "
    "VLLM_SERVER_DEV_MODE=1"
)


def _parts(sent: Sent) -> Iterator[tuple[str, Tensor]]:
    for number, at in enumerate(sent.place.at):
        yield f"at.{number}", at.to(torch.int32).contiguous()
    yield "values", sent.values.contiguous()
    if sent.own is not None:
        yield "own", sent.own.contiguous()


def _slices(adapter: AdapterFile, base: str | None) -> list[Sent]:
    raise_together(problems(adapter))
    checkpoint = open_base(adapter, base, weights=True)
    raise_together(
        f"{module} is a slice of stacked experts, which are not sent to an engine; use `s2ft merge`"
        for module in adapter.slices
        if checkpoint.is_stacked(module)
    )
    return [sent for module in adapter.slices for sent in _of_module(adapter, checkpoint, module)]


def _of_module(adapter: AdapterFile, base: Checkpoint, module: str) -> Iterator[Sent]:
    trained, delta = adapter.slices[module], adapter.delta(module)
    for place in base.places(module, trained):
        weight = base.tensor(place.tensor)
        yield Sent(place, merged_rows(place, weight, trained, delta), place.read(weight))


def _post_all(url: str, info: dict[str, Any], key: str | None) -> None:
    """Pauses the server when all it has begun is answered, and lets it go on afterwards, whatever fails."""
    try:
        _post(url, "pause?mode=wait&clear_cache=true", None, key)
        _post(url, "start_weight_update", None, key)
        _post(url, "update_weights", {"update_info": info}, key)
        _post(url, "finish_weight_update", None, key)
        _post(url, "reset_prefix_cache", None, key)
    except BaseException:  # also a pause that took too long: the server may still begin it
        with suppress(S2FTError):
            _post(url, "resume", None, key)
        raise
    _post(url, "resume", None, key)


def _post(url: str, path: str, body: dict[str, Any] | None, key: str | None) -> None:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(f"{url}/{path}", json.dumps(body or {}).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=WAIT):
            pass
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:500]
        raise S2FTError(f"{url}/{path} answers {error.code}: {said}. {_HELP}") from error
    except OSError as error:
        raise S2FTError(f"{url} does not answer: {error}") from error
