"""A merged checkpoint is the loaded model's merge, bit for bit; a patch leads to the same values."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

import s2ft
from adapter_files import edit
from commands import contents
from exported import SIDES, load, load_base, save_adapter, save_base
from families import FAMILIES, TWO_BLOCKS
from live import same
from s2ft import S2FTConfig, S2FTError
from s2ft.adapters.checkpoint import Checkpoint
from s2ft.adapters.file import open_adapter, read_adapter
from s2ft.adapters.merge import merge
from s2ft.cli.app import app
from tiny_base import CHAT_TEMPLATE, byte_tokenizer

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's files."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_patched_files_are_the_merged_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family, dtype)
    adapter = save_adapter(tmp_path / "adapter", base, SIDES["both"])
    load(base, adapter).merge_and_unload().save_pretrained(tmp_path / "loaded")
    wanted = stored(tmp_path / "loaded")
    assert not same(wanted, stored(base))

    merge(adapter, tmp_path / "merged")
    assert same(stored(tmp_path / "merged"), wanted)
    reloaded = load_base(tmp_path / "merged")
    assert same(dict(reloaded.state_dict()), dict(load_base(tmp_path / "loaded").state_dict()))

    s2ft.export(adapter, "patch", tmp_path / "patch.safetensors")
    state, patch = stored(base), load_file(tmp_path / "patch.safetensors")
    names = sorted({name.rpartition(".")[0] for name in patch})
    for _ in range(2):  # values are absolute: twice is once
        for name in names:
            state[name].view(-1)[patch[f"{name}.indices"].long()] = patch[f"{name}.values"]
    assert same(state, wanted)
    assert sum(patch[f"{name}.values"].numel() for name in names) == read_adapter(adapter).parameters
    assert all(patch[f"{name}.indices"].dtype == torch.int32 for name in names)
    assert all((patch[f"{name}.indices"].diff() > 0).all() for name in names)


def test_fused_adapters_are_checked_part_by_part_and_merged(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    a = save_adapter(tmp_path / "a", base, 0.3)
    b = save_adapter(tmp_path / "b", base, 0.3)
    s2ft.fuse([a, b], output=tmp_path / "both")
    load(base, tmp_path / "both").merge_and_unload().save_pretrained(tmp_path / "loaded")
    merge(tmp_path / "both", tmp_path / "merged")
    assert same(stored(tmp_path / "merged"), stored(tmp_path / "loaded"))
    other = save_base(tmp_path / "other", "llama", torch.bfloat16)
    with pytest.raises(S2FTError, match="made for another base"):
        merge(tmp_path / "both", tmp_path / "no", str(other))


def test_shards_tokenizer_and_templates_come_along(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.bfloat16, max_shard_size="8KB")
    byte_tokenizer(CHAT_TEMPLATE).save_pretrained(base)
    for name in (
        "source.spm",
        "prophetnet.tokenizer",
        "bpe.codes",
    ):  # as tokenizers of Marian, ProphetNet and PhoBERT have
        (base / name).write_bytes(b"a vocabulary")
    (base / "README.md").write_text("the base's own card")
    (base / "pytorch_model.bin").write_bytes(b"a pickle")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    adapter = save_adapter(tmp_path / "adapter", base, SIDES["both"])
    (base / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    merge(adapter, tmp_path / "merged")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == shards
    changed = {module + ".weight" for module in read_adapter(adapter).slices}
    for shard in shards:
        before, after = load_file(base / shard), load_file(tmp_path / "merged" / shard)
        differing = {name for name in before if not torch.equal(before[name], after[name])}
        assert differing == changed & before.keys()
        assert list(before) == list(after)
    left_out = {"README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json"}
    assert {p.name for p in base.iterdir()} - left_out == {p.name for p in (tmp_path / "merged").iterdir()}
    (base / "adapter_config.json").unlink()  # else transformers would take the base for an adapter
    assert same(
        dict(load(base, adapter).merge_and_unload().state_dict()), dict(load_base(tmp_path / "merged").state_dict())
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    chat = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<user>x"


@pytest.mark.parametrize("name", ["lm_head", "head"])  # PEFT takes the end of a path
def test_whole_modules_are_merged(name: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, 0.3, modules_to_save=[name])
    model = load(base, adapter).merge_and_unload()
    model.save_pretrained(tmp_path / "loaded")
    merge(adapter, tmp_path / "merged")
    assert same(stored(tmp_path / "merged"), stored(tmp_path / "loaded"))
    assert not torch.equal(stored(tmp_path / "merged")["lm_head.weight"], stored(base)["lm_head.weight"])


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("llama-mqa", {"modules_to_save": ["embed_tokens"]}, "ties its embedding to its output layer"),
        ("llama", {"trainable_token_indices": [3]}, "token_adapter.* cannot be merged on files"),
    ],
)
def test_what_files_cannot_hold_is_refused(family: str, config: dict, message: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    adapter = save_adapter(tmp_path / "adapter", base, 0.3, **config)
    with pytest.raises(S2FTError, match=message):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("held", [["model.embed_tokens"], ["model.embed_tokens", "lm_head"], ["lm_head"]])
def test_an_adapter_on_a_tied_output_layer_is_refused(held: list[str], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama-mqa", torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    copies = {f"{module}.weight": embedding.clone() for module in held}
    save_file({**tensors, **copies}, base / "model.safetensors", {"format": "pt"})
    adapter = save_adapter(tmp_path / "adapter", base, 0.3, target_modules=["lm_head"])
    with pytest.raises(S2FTError, match=r"^lm_head: the base ties its embedding to its output layer"):
        merge(adapter, tmp_path / "merged")
    with pytest.raises(S2FTError, match=r"^lm_head: the base ties its embedding to its output layer"):
        s2ft.export(adapter, "patch", tmp_path / "patch.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def truncated(base: Path) -> None:
    file = next(iter(sorted(base.glob("*.safetensors"))))
    file.write_bytes(file.read_bytes()[:-10])


def pickled(base: Path) -> None:
    for file in base.glob("*.safetensors*"):
        file.unlink()
    (base / "pytorch_model.bin").write_bytes(b"")


def outside(base: Path) -> None:
    index = base / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    for file in base.glob("*.safetensors"):
        shutil.copy(file, base.parent)
    fields["weight_map"] = {name: f"../{file}" for name, file in fields["weight_map"].items()}
    index.write_text(json.dumps(fields))


def lost(base: Path) -> None:
    next(iter(sorted(base.glob("*.safetensors")))).unlink()


def configured(**fields: object) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, **fields}))

    return change


def overflowing(base: Path) -> None:
    for file in base.glob("*.safetensors"):
        save_file({name: torch.full_like(t, 65504) for name, t in load_file(file).items()}, file, {"format": "pt"})
    config = base.parent / "adapter" / "adapter_config.json"  # without its digest: this is not the base it was made for
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_digest": None}))


DAMAGE = {
    "truncated or no safetensors": truncated,
    "never unpickles": pickled,
    r"names the file '\.\./model": outside,
    "has no model-00001": lost,
    "quantised": configured(quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]}),
    "expected plain values of shape": configured(intermediate_size=60),
    "configuration cannot be loaded": configured(model_type="unheard-of"),
    "without config.json": lambda base: (base / "config.json").unlink(),
    "do not fit torch.float16": overflowing,
}


@pytest.mark.parametrize("message", DAMAGE)
def test_bad_bases_are_refused_and_nothing_is_written(message: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.float16, max_shard_size="8KB")
    adapter = save_adapter(tmp_path / "adapter", base, {"down_proj": 0.5}, size=300)
    DAMAGE[message](base)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(S2FTError, match=message):
        merge(adapter, tmp_path / "merged")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "merged").exists()


def test_a_patch_whose_values_overflow_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.float16)
    adapter = save_adapter(tmp_path / "adapter", base, {"down_proj": 0.5}, size=300)
    overflowing(base)
    with pytest.raises(S2FTError, match=r"do not fit torch\.float16"):
        s2ft.export(adapter, "patch", tmp_path / "patch.safetensors")
    assert not (tmp_path / "patch.safetensors").exists()


def test_memory_is_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, {"o_proj": 0.5})
    read = []
    real = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: read.append(name) or real(self, name))
    merge(adapter, tmp_path / "merged")
    assert set(read) == {f"{module}.weight" for module in read_adapter(adapter).slices}


def test_the_command_line_merges_with_a_base_of_its_own(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, 0.5)
    moved = base.rename(tmp_path / "moved")
    merged, facts = tmp_path / "merged", tmp_path / "facts.json"
    arguments = ["merge", str(adapter), "--base", str(moved), "--output", str(merged), "--json", str(facts)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    assert json.loads(facts.read_text())["bytes"] == sum(path.stat().st_size for path in merged.iterdir())
    model = PeftModel.from_pretrained(load_base(moved), adapter).merge_and_unload()
    assert same(dict(load_base(merged).state_dict()), dict(model.state_dict()))


def test_links_out_of_the_base_are_not_followed(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", max_shard_size="8KB")
    adapter = save_adapter(tmp_path / "adapter", base, {"o_proj": 0.5})
    secret = tmp_path / "secret.txt"
    secret.write_text("not for others")
    (base / "notes.txt").symlink_to(secret)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").symlink_to(secret)
    with pytest.raises(
        S2FTError, match=r"2 problems[^$]*notes.txt is a link out of its folder[^$]*tool.jinja is a link"
    ):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_links_of_the_hubs_cache_and_within_the_base_are(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", max_shard_size="8KB")
    adapter = save_adapter(tmp_path / "adapter", base, {"o_proj": 0.5})
    merge(adapter, tmp_path / "expected")
    snapshot, blobs = (
        tmp_path / "hub" / "models--o--m" / "snapshots" / "0a1b",
        tmp_path / "hub" / "models--o--m" / "blobs",
    )
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    (tmp_path / "link").symlink_to(snapshot)
    for name in (snapshot, tmp_path / "link"):
        merged = merge(adapter, tmp_path / f"merged-{name.name}", str(name))
        assert contents(merged) == contents(tmp_path / "expected")
        assert not any(path.is_symlink() for path in merged.iterdir())


@pytest.mark.parametrize(("family", "dtype", "known"), [
    ("llama", torch.bfloat16, True),
    ("llama", torch.float32, True),
    ("llama", torch.float16, False),  # no SHA-256 is kept of float16
    ("gpt2", torch.float32, False),  # its weights are stored as [in, out]
])  # fmt: skip
def test_recognised_layers_are_merged_as_by_the_model(
    family: str, dtype: torch.dtype, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", family, dtype)
    adapter = save_adapter(tmp_path / "adapter", base, SIDES["both"])
    opened = open_adapter(adapter)
    assert Checkpoint(Path(base), opened).recognises(opened) == known
    merge(adapter, tmp_path / "quick")
    monkeypatch.setattr(Checkpoint, "recognises", lambda self, adapter: False)
    merge(adapter, tmp_path / "by model")
    assert same(stored(tmp_path / "quick"), stored(tmp_path / "by model"))


def test_other_weights_of_the_same_names_and_shapes_are_not_recognised(tmp_path: Path) -> None:
    base, other = (save_base(tmp_path / name, "llama", torch.bfloat16) for name in ("base", "other"))
    opened = open_adapter(save_adapter(tmp_path / "adapter", base, SIDES["both"]))
    assert Checkpoint(Path(base), opened).recognises(opened)
    assert not Checkpoint(Path(other), opened).recognises(opened)


def vision(kind: str, **text: object) -> PreTrainedModel:
    """A tiny model of a language model and a vision tower, in float16, whose digests do not tell its files."""
    config = getattr(transformers, f"{kind}Config")(
        text_config={**TWO_BLOCKS, "num_key_value_heads": 2, **text},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 24},
    )
    model: PreTrainedModel = getattr(transformers, f"{kind}ForConditionalGeneration")(config).half()
    return model


def merged_live(kind: type[PreTrainedModel], base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Saves a random adapter, and returns the values of the model that it is merged into."""
    config = S2FTConfig(ratios=0.4, init_weights=False, task_type="CAUSAL_LM")
    get_peft_model(kind.from_pretrained(base, dtype="auto"), config).save_pretrained(adapter)
    loaded = PeftModel.from_pretrained(kind.from_pretrained(base, dtype="auto"), adapter)
    return dict(loaded.merge_and_unload().state_dict())


def test_a_model_that_no_class_of_its_task_knows_is_merged(tmp_path: Path) -> None:
    made = vision("Qwen2_5_VL")
    made.save_pretrained(tmp_path / "base")
    wanted = merged_live(type(made), tmp_path / "base", tmp_path / "adapter")
    assert not same(wanted, dict(made.state_dict()))
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert same(dict(type(made).from_pretrained(tmp_path / "merged", dtype="auto").state_dict()), wanted)


@pytest.mark.parametrize("transposed", [True, False])
def test_experts_are_found_in_either_of_two_forms_of_one_name(transposed: bool, tmp_path: Path) -> None:
    """Published checkpoints of Qwen3-VL-MoE hold [experts, in, out]; transformers saves [experts, out, in], and reads both."""
    sizes = {"moe_intermediate_size": 20, "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 6}
    made, base = vision("Qwen3VLMoe", **sizes), tmp_path / "base"
    made.save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name and transposed]:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    wanted = merged_live(type(made), base, tmp_path / "adapter")
    assert {module.rpartition(".")[2] for module in read_adapter(tmp_path / "adapter").slices} == {
        "o_proj",
        "down_proj",
    }
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert same(dict(type(made).from_pretrained(tmp_path / "merged", dtype="auto").state_dict()), wanted)
    before, after = stored(base), stored(tmp_path / "merged")
    assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in before.items()}
    assert any(not torch.equal(after[name], before[name]) for name in before if ".experts." in name)


def test_the_revision_is_that_of_the_adapters_own_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, {"o_proj": 0.5})
    edit(adapter, base_model_name_or_path="org/model", revision="0a1b")
    asked = []

    def download(name: str, revision: str | None, **_: object) -> str:
        asked.append((name, revision))
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for number, name in enumerate((None, "org/model", "org/copy")):
        merge(adapter, tmp_path / f"merged-{number}", name)
    assert asked == [("org/model", "0a1b"), ("org/model", "0a1b"), ("org/copy", None)]
