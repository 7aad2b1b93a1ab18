"""The base model and its adapters: how they are loaded, and what tells one from another.

One base is loaded, and lent to one adapter after the other; each leaves it as it was.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from s2ft.common.errors import S2FTError
from s2ft.common.reading import read_json
from s2ft.evaluate.engines import Engine, TransformersEngine, VllmEngine, all_ends, end_ids, in_words
from s2ft.evaluate.options import Subject
from s2ft.format.folder import WEIGHTS_FILE
from s2ft.runtime.failures import is_out_of_memory
from s2ft.runtime.models import load_config, load_model, load_tokenizer
from s2ft.tuner.unloading import changes_base, own_modules_back

RUN_FILE = "run.json"
_DIGESTED = (  # weights, settings, chat template, vocabularies; nothing that may be put beside them, such as a run card
    *("*.safetensors", "*.gguf", "*.index.json", "*config.json", "chat_template.json", "*.jinja", "*.model", "*.spm"),
    *("tokenizer*.json", "*tokens*.json", "vocab*.json", "vocab*.txt", "merges.txt"),
)
_MADE_BY = ("transformers_version", "peft_version")  # in a config; the same model saved by another version is the same


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
    """An identity that does not depend on the path: a digest of the files, or the commit on the Hub.

    Args:
        name: A folder, a GGUF file, or a name on the Hub.
        file: A file that it has, such as "config.json".

    Raises:
        S2FTError: if there is nothing by that name.
    """
    folder = Path(name)
    if folder.is_file():  # a GGUF file
        with folder.open("rb") as content:
            return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()[:32]}"
    if not folder.is_dir():
        return f"{name}@{_commit(name, file)}"
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if any(map(path.match, _DIGESTED))):
        digest.update(f"{path.name} {_content_digest(path)}\n".encode())
    return f"sha256:{digest.hexdigest()[:32]}"


def _content_digest(path: Path) -> str:
    if path.match("*config.json"):
        with suppress(S2FTError):
            settings = {name: value for name, value in read_json(path).items() if name not in _MADE_BY}
            return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


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
        self.dtype = dtype
        self._name, self._engine, self._batch_size = name, engine, batch_size
        self._base: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(name)

    @property
    def base(self) -> PreTrainedModel:
        """The base model, on the accelerator if there is one."""
        if self._base is None:
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            self._base = load_model(self._name, self.dtype).to(accelerator or "cpu").eval()
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
            config = model.active_peft_config
            with own_modules_back(self.base):
                base = model.unload()
            self._base = None if changes_base(config) else base

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
        source, ends = self._name, all_ends(_generation(self._name), self.tokenizer)
        if subject.adapter is not None:
            merged = load_adapter(load_model(self._name, self.dtype), subject.adapter).merge_and_unload()
            merged.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            source, ends = folder, end_ids(merged, self.tokenizer)
        return VllmEngine(source, str(self.dtype).removeprefix("torch."), ends)


def load_adapter(base: PreTrainedModel, adapter: str) -> PeftModel:
    """The adapter on its base.

    Raises:
        S2FTError: if it cannot be loaded, or was made for another base.
    """
    if not Path(adapter).is_dir():
        _commit(adapter, WEIGHTS_FILE)  # PEFT would open a pickle if there is none
    try:
        with _complete(adapter):
            if PeftConfig.from_pretrained(adapter).is_prompt_learning:
                raise S2FTError(f"adapter={adapter!r} puts tokens before the prompt, which s2ft eval does not go with")
            return PeftModel.from_pretrained(base, adapter).eval()
    except S2FTError:
        raise
    except Exception as error:  # broken files raise many kinds of errors
        if is_out_of_memory(error):
            raise
        raise S2FTError(f"adapter={adapter!r} cannot be loaded: {in_words(error)}") from error


@contextmanager
def _complete(adapter: str) -> Iterator[None]:
    """PEFT only warns of tensors that it looked for in vain; such an adapter would do nothing there."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        yield
    for one in heard:
        if (said := str(one.message)).startswith("Found missing adapter keys"):
            raise S2FTError(f"adapter={adapter!r} has no values for some of its layers in this base: {said}")
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _generation(name: str) -> GenerationConfig:
    with suppress(OSError, TypeError):  # there is none, or no object in it
        return GenerationConfig.from_pretrained(name)
    return GenerationConfig.from_model_config(load_config(name))
