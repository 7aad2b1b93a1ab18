"""Damaged adapter folders through every reader: refused clearly by all, and nothing changed; or the same adapter in all."""

import copy
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from families import build, tokens
from live import state, unchanged
from mutations import CONFIG, SOUND, fresh, mutate
from s2ft import S2FTConfig, S2FTError, export, fuse
from s2ft.adapters.file import open_adapter, read_adapter
from s2ft.adapters.inspection import summary
from s2ft.adapters.merge import merge
from s2ft.cli.inspect import table
from s2ft.tuner.pool import AdapterPool

KINDS: dict[str, dict[str, Any]] = {
    "slices": {},
    "modules_to_save": {"modules_to_save": ["model.norm"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [1, 5]}},
}


X = tokens(2, 5)


class House:
    """A base on disk, a sound adapter of each kind, and models that are to survive."""

    refused: bool  # is the folder at hand unsound?

    def __init__(self, root: Path) -> None:
        self.root, self.base = root, str(root / "base")
        torch.manual_seed(0)
        build("llama", torch.float32).save_pretrained(self.base)
        self.reference: dict[str, torch.Tensor] = {}  # what the model of each adapter answered before it was saved
        self.sound = {kind: self._adapter(kind) for kind in KINDS}
        self.furnish()

    def _adapter(self, kind: str) -> Path:
        ratios = {"o_proj": 0.25, "v_proj": 0.5, "down_proj": 0.1}
        config = S2FTConfig(ratios=ratios, init_weights=False, task_type="CAUSAL_LM", **KINDS[kind])
        model = get_peft_model(self.loaded(), config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
            self.reference[kind] = model(X).logits
        assert not torch.allclose(self.reference[kind], self.loaded()(X).logits, atol=0.01)
        model.save_pretrained(self.root / kind)
        return self.root / kind

    def loaded(self) -> PreTrainedModel:
        """A fresh base."""
        return LlamaForCausalLM.from_pretrained(self.base).eval()

    def furnish(self) -> None:
        """The bare base; one with an adapter; one with an adapter by transformers' own interface."""
        self.model, self.native = self.loaded(), self.loaded()
        self.live = PeftModel.from_pretrained(self.loaded(), self.sound["slices"], adapter_name="first")
        self.native.load_adapter(str(self.sound["slices"]), "first")
        self.answer, self.first = self.model(X).logits, self.live(X).logits
        self.before = [state(model) for model in (self.model, self.live, self.native)]

    def lent(self, model: Any) -> Any:
        """The model itself where the folder is to be refused: it must not change."""
        return model if self.refused else copy.deepcopy(model)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("fuzz"))


def read(house: House, folder: Path) -> None:
    read_adapter(folder)


def opened(house: House, folder: Path) -> None:
    open_adapter(folder)


def configured(house: House, folder: Path) -> None:
    S2FTConfig.from_pretrained(str(folder))


def inspected(house: House, folder: Path) -> None:
    adapter = read_adapter(folder)
    Console(file=io.StringIO()).print(table(adapter))
    json.dumps(summary(adapter))


@contextmanager
def unharmed(model: nn.Module, before: dict[str, Any]) -> Iterator[None]:
    """Whatever is raised, the model is what it was; else its old tensors hold what they held."""
    held = list(model.state_dict().items())
    try:
        yield
    except Exception:
        assert unchanged(before, model), "refused, and changed the model"
        raise
    assert all(torch.equal(tensor, before["values"][name]) for name, tensor in held), "changed the base"


def loaded_fresh(house: House, folder: Path) -> torch.Tensor:
    model = house.lent(house.model)
    with unharmed(model, house.before[0]):
        loaded = PeftModel.from_pretrained(model, folder)
    with loaded.disable_adapter():
        assert torch.equal(loaded(X).logits, house.answer), "changed the base"
    return loaded(X).logits


def loaded_live(house: House, folder: Path) -> torch.Tensor:
    model = house.lent(house.live)
    with unharmed(model, house.before[1]):
        model.load_adapter(str(folder), "other")
    assert torch.equal(model(X).logits, house.first), "changed the other adapter"
    model.set_adapter("other")
    return model(X).logits


def loaded_native(house: House, folder: Path) -> torch.Tensor:
    model = house.lent(house.native)
    with unharmed(model, house.before[2]):
        model.load_adapter(str(folder), "other")
    return model(X).logits


def pooled(house: House, folder: Path) -> torch.Tensor:
    model = house.lent(house.live)
    with unharmed(model, house.before[1]):
        pool = AdapterPool(model, {"pooled": folder}, device_bytes=2**24, host_bytes=0)
        try:
            pool.bring(["pooled"])
        except BaseException:
            pool.close()  # the next folder finds a model without a pool
            raise
    return model(X, adapter_names=["pooled"] * len(X)).logits


def merged(house: House, folder: Path) -> torch.Tensor:
    output = merge(folder, house.root / "out", house.base)
    return LlamaForCausalLM.from_pretrained(output)(X).logits


def fused(house: House, folder: Path) -> None:
    fuse([folder], output=house.root / "out")
    read_adapter(house.root / "out")


def exported(to: str) -> Callable[[House, Path], None]:
    def call(house: House, folder: Path) -> None:
        export(folder, to, house.root / ("out.safetensors" if to == "patch" else "out"), house.base)

    call.__name__ = f"exported_{to}"
    return call


FILES: tuple[Callable[[House, Path], Any], ...] = (  # need no base: all of one mind
    read,
    opened,
    configured,
    inspected,
    fused,
)
MODELS = (loaded_fresh, loaded_live, loaded_native)
NARROW = (
    pooled,
    merged,
    exported("lora"),
    exported("patch"),
    exported("vllm"),
)  # may refuse what is kept beside the slices


BESIDE = {  # who says of a sound folder that it takes slices alone, and how
    "modules_to_save": {
        "pooled": "holds slices only",
        "exported_patch": "holds slices alone",
        "exported_vllm": "no whole modules",
    },
    "tokens": {
        "pooled": "holds slices only",
        "merged": "cannot be merged on files",
        "exported_patch": "holds slices alone",
        "exported_vllm": "no single token embeddings",
    },
}


def verdict(reader: Callable[[House, Path], Any], house: House, folder: Path) -> Any:
    """What a reader returns, or the `S2FTError` that it raises; any other exception is a violation."""
    try:
        return reader(house, folder)
    except S2FTError as error:
        return error
    except Exception as error:
        return AssertionError(f"{getattr(reader, '__name__', reader)}: {type(error).__name__}: {error}")


def attack(house: House, folder: Path, kind: str, sound: bool) -> Iterator[str]:
    """The violations that one folder leads to."""
    verdicts: dict[Any, Any] = {}
    expected = verdict(FILES[0], house, folder)
    house.refused = isinstance(expected, Exception) and "its peft_type is 'LORA'" not in str(expected)
    for reader in (*FILES, *MODELS, *NARROW):
        verdicts[reader] = verdict(reader, house, folder)
        yield from judged(reader, verdicts[reader], verdicts[FILES[0]], left_over(house))
        if house.refused and "refused, and changed" in str(verdicts[reader]):
            house.furnish()
    yield from disagreements({reader.__name__: verdicts[reader] for reader in MODELS})
    if sound:
        yield from refusals(verdicts, kind, house.reference[kind])


def refusals(verdicts: dict[Any, Any], kind: str, reference: torch.Tensor) -> Iterator[str]:
    """A sound folder is taken by all who can hold it, and its model is the one that was saved."""
    for reader, found in verdicts.items():
        reason = BESIDE.get(kind, {}).get(reader.__name__)
        if reason is not None and (not isinstance(found, S2FTError) or reason not in str(found)):
            yield f"{reader.__name__} does not say {reason!r}: {found}"
        elif reason is None and isinstance(found, Exception):
            yield f"{reader.__name__} refuses a sound folder: {found}"
        elif reason is None and reader in (*MODELS, pooled, merged) and not torch.allclose(found, reference, atol=1e-4):
            yield f"{reader.__name__} gives another output than the model that was saved"


def judged(reader: Any, found: Any, expected: Any, left: list[str]) -> Iterator[str]:
    """Violations of one reader, beside the verdict of `read_adapter`."""
    if "its peft_type is" in str(expected) and reader is configured:
        return  # as PEFT has it: another method's config, or PEFT's own error
    if "its peft_type is 'LORA'" in str(expected) and reader is loaded_fresh and "changed the base" in str(found):
        return  # PEFT alone reads a LoRA, and loads whatever the file names
    if isinstance(found, AssertionError):
        yield str(found)
    if isinstance(found, Exception) and "\x1b" in str(found):
        yield f"{reader.__name__}: an escape sequence in {str(found)!r}"
    if "its peft_type is 'LORA'" in str(expected) and reader in (loaded_fresh, loaded_native):
        return  # they take any method's
    if reader is configured and "adapter_model.safetensors" in str(expected):
        return  # a config alone is one, too
    if isinstance(expected, S2FTError) and not isinstance(found, Exception):
        yield f"{reader.__name__} takes what read_adapter refuses: {expected}"
    if reader in FILES and not isinstance(expected, Exception) and isinstance(found, Exception):
        yield f"{reader.__name__} refuses what read_adapter takes: {found}"
    if isinstance(found, Exception) and left:
        yield f"{reader.__name__} refused, and left {left}"


def left_over(house: House) -> list[str]:
    """What lies in the output's place; taken away."""
    left = [path for path in house.root.iterdir() if path.name.startswith("out")]
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [path.name for path in left]


def disagreements(verdicts: dict[str, Any]) -> Iterator[str]:
    if "its peft_type is" in str(verdicts["loaded_live"]):
        return
    logits = [found for found in verdicts.values() if isinstance(found, torch.Tensor)]
    if logits and len(logits) < len(verdicts):
        yield f"loaders disagree: { {name: str(found)[:150] for name, found in verdicts.items()} }"
    if any(not torch.allclose(logits[0], other, atol=1e-4, equal_nan=True) for other in logits[1:]):
        yield "loaders give different outputs"


@pytest.mark.soak
@pytest.mark.usefixtures("one_thread", "seeded")
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_folder_is_refused_by_all_readers_and_changes_nothing(
    house: House, tries: Callable[[int, int], int]
) -> None:
    rng = random.Random(torch.initial_seed())
    found: list[str] = []
    refused = []
    for _ in range(tries(300, 10_000)):
        kind = rng.choice(list(KINDS))
        folder = fresh(house.sound[kind], house.root / "mutated")
        how = mutate(folder, rng)
        found += [f"{kind}, {how}: {violation}" for violation in attack(house, folder, kind, how in SOUND)]
        refused.append(house.refused)
    assert not found, f"{len(found)} violations\n" + "\n".join(found[:200])
    assert any(refused)
    assert not all(refused)


def versioned(house: House, kind: str, **fields: object) -> Path:
    """A sound folder whose config has other keys; those that are None are left out."""
    folder = fresh(house.sound[kind], house.root / "versioned")
    held = {**json.loads((folder / CONFIG).read_text()), **fields}
    (folder / CONFIG).write_text(
        json.dumps({name: value for name, value in held.items() if name not in fields or value})
    )
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{"format_version": None}, {"format_version": "1.9", "shiny": [1, 2]}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_every_reader_takes_formats_of_before_and_of_newer_minor_versions(
    house: House, kind: str, fields: dict[str, Any]
) -> None:
    assert not list(attack(house, versioned(house, kind, **fields), kind, sound=True))
    assert not house.refused


@pytest.mark.filterwarnings("ignore")
def test_every_reader_refuses_a_newer_major_version_by_name(house: House) -> None:
    folder = versioned(house, "slices", format_version="2.0", shiny=3)
    assert not list(attack(house, folder, "slices", sound=False))
    for reader in (*FILES, *MODELS, *NARROW):
        assert "format_version='2.0' is newer" in str(found := verdict(reader, house, folder)), reader
        assert "upgrade s2ft" in str(found), reader
