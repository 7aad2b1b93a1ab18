"""Who is evaluated: the base model, or an adapter on it; what tells them apart, and how they are loaded.

One base is loaded, and lent to one adapter after the other; each leaves it as it was.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2ft.common.errors import S2FTError, raise_together
from s2ft.common.reading import read_json
from s2ft.data.tokens import end_tokens
from s2ft.evaluate.engines import Engine, VllmEngine, end_ids, in_words
from s2ft.evaluate.generation import TransformersEngine
from s2ft.runtime.failures import is_out_of_memory
from s2ft.runtime.models import load_model, load_tokenizer

BASE = "base"
ADAPTER_FILE, MODEL_FILE, RUN_FILE = "adapter_config.json", "config.json", "run.json"
_DIGESTED = (".safetensors", ".json")  # a run card (run.json) says when, not what


@dataclass(frozen=True)
class Subject:
    """The base model (`adapter` None) or an adapter, under the name that its results go by."""

    label: str
    adapter: str | None


def find_subjects(adapters: Sequence[str]) -> list[Subject]:
    """The base model if no adapter is given; else each adapter, named by its folder.

    Raises:
        S2FTError: if a folder holds no adapter, or two have the same name.

    Example:
        >>> find_subjects([])
        [Subject(label='base', adapter=None)]
    """
    subjects = [
        Subject(Path(name).resolve().name if Path(name).is_dir() else Path(name).name, name) for name in adapters
    ]
    labels = [subject.label for subject in subjects]
    raise_together(
        [
            *(problem for name in adapters if (problem := _no_adapter(name))),
            *(f"adapter={name!r}: its results would go by {BASE!r}, the base model's name; rename it"
              for name, label in zip(adapters, labels, strict=True) if label == BASE),
            *(f"adapter: two go by {label!r}; results are kept by the folder's name, so give them different ones"
              for label in sorted({label for label in labels if labels.count(label) > 1})),
        ]
    )  # fmt: skip
    return subjects or [Subject(BASE, None)]


def trained_on(name: str) -> str | None:
    """The format of the data that an adapter or a model was trained on: "chat", "alpaca" or "text".

    Its run card or checkpoint notes it; None if there is no such note.
    """
    folder = Path(name)
    try:
        note = folder / RUN_FILE if folder.is_dir() else Path(hf_hub_download(name, RUN_FILE))
        found = read_json(note)["data"]["format"]
    except Exception:  # no such file, no connection, another tool's file of that name, ...
        return None
    return found if isinstance(found, str) else None


def fingerprint(name: str, file: str) -> str:
    """What tells a model or adapter from another, wherever it lies: a digest of its files, or its commit on the Hub.

    Args:
        name: A folder, or a name on the Hub.
        file: A file that it has, such as "config.json".

    Raises:
        S2FTError: if there is nothing by that name.
    """
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{_commit(name, file)}"
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _DIGESTED and path.name != RUN_FILE):
        with path.open("rb") as content:
            digest.update(f"{path.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()[:32]}"


def _commit(name: str, file: str) -> str:
    try:
        return Path(hf_hub_download(name, file)).parent.name  # .../snapshots/COMMIT/FILE
    except Exception as error:  # no such name, no connection, no access, ...
        raise S2FTError(
            f"{name!r} is no folder here, and its {file} cannot be had from the Hub: {in_words(error)}"
        ) from error


class Models:
    """The base model and its tokenizer, loaded when they are first needed; engines for it and its adapters.

    Args:
        name: The base model: a folder or a name on the Hub.
        dtype: Of its weights.
        engine: "transformers" or "vllm".
        batch_size: Prompts that transformers takes at once.
    """

    def __init__(self, name: str, dtype: torch.dtype, engine: str, batch_size: int) -> None:
        self._name, self._dtype, self._engine, self._batch_size = name, dtype, engine, batch_size
        self._base: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(name)

    @property
    def base(self) -> PreTrainedModel:
        """The base model, on the accelerator if there is one."""
        if self._base is None:
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            self._base = load_model(self._name, self._dtype).to(accelerator or "cpu").eval()
        return self._base

    @contextmanager
    def loaded(self, subject: Subject) -> Iterator[Any]:
        """The model of a subject; afterwards the base is what it was."""
        if subject.adapter is None:
            yield self.base
            return
        model = load_adapter(self.base, subject.adapter)
        try:
            yield model
        finally:
            self._base = model.unload()

    @contextmanager
    def engine(self, subject: Subject) -> Iterator[Engine]:
        """What answers for a subject."""
        if self._engine == "transformers":
            with self.loaded(subject) as model:
                yield TransformersEngine(model, self.tokenizer, self._batch_size)
        else:
            with tempfile.TemporaryDirectory() as folder:
                yield self._vllm(subject, folder)

    def _vllm(self, subject: Subject, folder: str) -> Engine:
        source, ends = self._name, end_tokens(self.tokenizer)
        if subject.adapter is not None:
            merged = load_adapter(load_model(self._name, self._dtype), subject.adapter).merge_and_unload()
            merged.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            source, ends = folder, end_ids(merged, self.tokenizer)
        return VllmEngine(source, str(self._dtype).removeprefix("torch."), ends)


def load_adapter(base: PreTrainedModel, adapter: str) -> PeftModel:
    """The adapter on its base.

    Raises:
        S2FTError: if it cannot be loaded, or was made for another base.
    """
    try:
        return PeftModel.from_pretrained(base, adapter).eval()
    except S2FTError:
        raise
    except Exception as error:  # as many kinds as there are ways for files to be broken
        if is_out_of_memory(error):
            raise
        raise S2FTError(f"adapter={adapter!r} cannot be loaded: {in_words(error)}") from error


def _no_adapter(name: str) -> str | None:
    path = Path(name)
    if path.is_dir() and not (path / ADAPTER_FILE).is_file():
        return f"adapter={name!r} is a folder without {ADAPTER_FILE}, so it holds no adapter"
    if not path.is_dir() and (path.exists() or name.startswith((".", "/", "~"))):
        return f"adapter={name!r} is not a folder; name the folder of an adapter, or an adapter on the Hub"
    return None
