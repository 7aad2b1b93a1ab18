"""Is there a model of a name, in a folder or on the Hub? Asked before torch is loaded."""

from __future__ import annotations

from pathlib import Path

from s2ft.common.errors import S2FTError, first_line
from s2ft.runtime.gguf import check_gguf, gguf_file


def check_folder(name: str) -> None:
    """Raises `S2FTError` for a folder that holds no model, and for a path where there is none."""
    path = Path(name)
    if (file := gguf_file(name)) is not None:
        check_gguf(file)
        return
    if path.is_dir() and not (path / "config.json").is_file():
        raise S2FTError(f"model={name!r} is a folder without config.json, so it holds no model")
    if not path.is_dir() and (path.exists() or name.startswith((".", "/", "~"))):
        raise S2FTError(
            f"model={name!r} is not a folder; name the folder of a model, a .gguf file, or a model on the Hub"
        )


def check_hub(name: str) -> None:
    """Raises `S2FTError` for what is neither a folder nor a model on the Hub, as far as the Hub can be asked.

    A model in the Hub's cache is there without a connection.
    """
    if Path(name).exists() or _is_cached(name):
        return
    from huggingface_hub import file_exists
    from huggingface_hub.errors import GatedRepoError

    try:
        if file_exists(name, "config.json"):
            return
        reason = "no such model on the Hub, or not with your token"
    except GatedRepoError:  # it is there; loading says how to get access
        return
    except Exception as error:  # offline, or no name that the Hub could have: httpx's and the Hub's own
        reason = f"the Hub says: {first_line(error)}"
    raise S2FTError(f"model={name!r}: there is no such folder here, and {reason}")


def _is_cached(name: str) -> bool:
    from huggingface_hub import constants  # this part alone is quick

    return Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots").is_dir()
