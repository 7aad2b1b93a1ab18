"""Fusing adapter folders: the identity, exactness, what is refused, the report, and the command."""

import copy
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import s2ft
from adapter_files import CONFIG, WEIGHTS, edit, write_tensors
from families import build, tokens
from s2ft import S2FTConfig, S2FTError, any_base
from s2ft.adapters.file import open_adapter, read_adapter
from s2ft.adapters.overlap import draw
from s2ft.cli.app import app
from s2ft.cli.fuse import table
from s2ft.cli.tables import print_table
from s2ft.format.saved import SavedConfig
from s2ft.format.slices import Slice
from s2ft.layer.linear import S2FTLinear

RATIOS = {"o_proj": 0.25, "v_proj": 0.5, "down_proj": 0.3}


def save(base: nn.Module, folder: Path, **config: object) -> Path:
    """An adapter of random deltas, trained by nobody."""
    options = {"ratios": RATIOS, "init_weights": False, **config}
    get_peft_model(copy.deepcopy(base), S2FTConfig(**options)).save_pretrained(folder)
    return folder


@pytest.fixture
def base() -> nn.Module:
    return build("llama", torch.float32)


@pytest.fixture
def pair(base: nn.Module, tmp_path: Path) -> list[Path]:
    """Two adapters of one base; their channels overlap."""
    return [
        save(base, tmp_path / name, seed=seed, task_type="CAUSAL_LM", ratios={"o_proj": 0.5, "down_proj": 0.6})
        for seed, name in enumerate("ab")
    ]


def load(base: nn.Module, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(base), folder)


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}])
@pytest.mark.parametrize("method", ["sum", "ties", "dare"])
def test_one_adapter_at_weight_one_is_itself_bit_for_bit(
    base: nn.Module, tmp_path: Path, method: str, extra: dict[str, object]
) -> None:
    folder = save(base, tmp_path / "a", seed=5, **extra)
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("s2ft_block.weight"))
    tensors[name][0, 0] = -0.0
    write_tensors(folder, tensors)
    s2ft.fuse([folder], [1.0], method, output=tmp_path / "same")
    same, given = (json.loads((path / CONFIG).read_text()) for path in (tmp_path / "same", folder))
    for fields in (same, given):
        fields["target_modules"].sort()  # PEFT writes a set, in the order of its hashes
        fields.pop("checksums")
    assert same == given
    assert (tmp_path / "same" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_two_tasks_trained_apart_by_avoid_fuse_exactly(base: nn.Module, tmp_path: Path) -> None:
    first = save(base, tmp_path / "a", seed=1)
    second = save(base, tmp_path / "b", seed=1, avoid=[str(first)])
    fusion = s2ft.fuse([first, second], output=tmp_path / "ab")
    assert [row.shared for row in fusion.overlaps] == [0] * 9
    a, b, both = (read_adapter(tmp_path / name) for name in ("a", "b", "ab"))
    for module, chosen in both.slices.items():
        dim = 1 if chosen.side == "in" else 0
        for part in (a, b):
            where = torch.from_numpy(np.searchsorted(chosen.indices, part.slices[module].indices))
            assert torch.equal(both.deltas[module].index_select(dim, where), part.deltas[module])
    models = {name: load(base, tmp_path / name) for name in ("a", "b", "ab")}
    for path, layer in base.named_modules():  # each layer's change of its output is the sum of both
        if path in both.slices:
            x = torch.randn(5, layer.in_features)
            change = {
                name: model.get_submodule(f"base_model.model.{path}")(x) - layer(x) for name, model in models.items()
            }
            torch.testing.assert_close(change["ab"], change["a"] + change["b"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [None, [0.5, 0.5], [2.0, -0.25]])
def test_a_fused_model_holds_the_weighted_sum(base: nn.Module, pair: list[Path], tmp_path: Path, weights) -> None:
    s2ft.fuse(pair, weights, output=tmp_path / "ab")
    models = [load(base, folder) for folder in (*pair, tmp_path / "ab")]
    for layers in zip(*(model.modules() for model in models), strict=True):
        if isinstance(layers[0], S2FTLinear):
            a, b, both = (layer.get_delta_weight("default").double() for layer in layers)
            first, second = weights or (1.0, 1.0)
            torch.testing.assert_close(both, first * a + second * b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_fused_projections_and_conv1d(family: str, tmp_path: Path) -> None:
    base = build(family, torch.float32)
    pair = [save(base, tmp_path / name, seed=seed, ratios=0.3) for seed, name in enumerate("ab")]
    s2ft.fuse(pair, [0.5, 2.0], output=tmp_path / "ab")
    models = [load(base, tmp_path / name) for name in ("a", "b", "ab")]
    for layers in zip(*(model.modules() for model in models), strict=True):
        if isinstance(layers[0], S2FTLinear):
            a, b, both = (layer.get_delta_weight("default").double() for layer in layers)
            torch.testing.assert_close(both, 0.5 * a + 2.0 * b, rtol=1e-6, atol=1e-8)


def test_modules_of_one_adapter_alone_are_taken_over(base: nn.Module, tmp_path: Path) -> None:
    first = save(base, tmp_path / "a", ratios={"o_proj": 0.5})
    second = save(base, tmp_path / "b", ratios={"down_proj": 0.2})
    s2ft.fuse([first, second], output=tmp_path / "ab")
    both, parts = read_adapter(tmp_path / "ab"), [read_adapter(first), read_adapter(second)]
    assert both.config.ratios is None
    for part in parts:
        for module, delta in part.deltas.items():
            assert torch.equal(both.deltas[module], delta)
    assert len(both.deltas) == sum(len(part.deltas) for part in parts)
    assert both.config.base_digest == {**parts[0].config.base_digest, **parts[1].config.base_digest}


def test_blocks_that_are_listed_by_their_pattern_may_differ(base: nn.Module, tmp_path: Path) -> None:
    configs = [
        {"ratios": {"o_proj": 0.5}, "layers_pattern": "layers", "layers_to_transform": [block], "seed": block}
        for block in (0, 2)
    ]
    first, second = (save(base, tmp_path / f"{n}", **config) for n, config in enumerate(configs))
    s2ft.fuse([first, second], output=tmp_path / "both")
    parts = {**read_adapter(first).deltas, **read_adapter(second).deltas}
    found = read_adapter(tmp_path / "both").deltas
    assert list(found) == [f"model.layers.{block}.self_attn.o_proj" for block in (0, 2)]
    assert all(torch.equal(found[module], parts[module]) for module in found)

    model, x = load(base, tmp_path / "both"), tokens(2, 5)
    live = PeftModel.from_pretrained(copy.deepcopy(base), first, adapter_name="a")
    live.load_adapter(str(second), adapter_name="b")
    live.add_weighted_adapter(["a", "b"], [1.0, 1.0], "ab", combination_type="sum")
    live.set_adapter("ab")
    assert torch.equal(live(x).logits, model(x).logits)
    assert not torch.allclose(model(x).logits, base(x).logits, atol=1e-3)


def test_each_part_of_a_union_is_still_checked_against_the_base(
    base: nn.Module, pair: list[Path], tmp_path: Path
) -> None:
    s2ft.fuse(pair, output=tmp_path / "ab")
    load(base, tmp_path / "ab")
    module = "model.layers.1.mlp.down_proj"
    assert str(read_adapter(pair[1]).slices[module]) in read_adapter(tmp_path / "ab").config.base_digest[module]
    other = copy.deepcopy(base)
    alone = set(read_adapter(pair[1]).slices[module].indices) - set(read_adapter(pair[0]).slices[module].indices)
    with torch.no_grad():
        other.get_submodule(module).weight[0, min(alone)] += 1
    with pytest.raises(S2FTError, match=rf"another base.*1 of 6 modules.*{module}"):
        load(other, tmp_path / "ab")
    again = s2ft.fuse([tmp_path / "ab", pair[0]], output=tmp_path / "again")  # a fused adapter can be fused
    assert again.config.base_digest == read_adapter(tmp_path / "ab").config.base_digest


def test_an_adapter_of_a_resaved_fusion_keeps_its_digests(base: nn.Module, pair: list[Path], tmp_path: Path) -> None:
    s2ft.fuse(pair, output=tmp_path / "ab")
    load(base, tmp_path / "ab").save_pretrained(tmp_path / "resaved")
    assert read_adapter(tmp_path / "resaved").config.base_digest == read_adapter(tmp_path / "ab").config.base_digest


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor], str], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors, next(name for name in sorted(tensors) if name.endswith("s2ft_block.weight")))
    write_tensors(folder, tensors)


def swap_digest(folder: Path) -> None:
    """The first adapter's own channels, trained on other weights."""
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((folder.parent / "a" / name).read_bytes())
    digests = json.loads((folder / CONFIG).read_text())["base_digest"]
    edit(folder, base_digest={**digests, "model.layers.1.mlp.down_proj": "00" * 16})


def add_whole_module(folder: Path) -> None:
    edit_tensors(folder, lambda tensors, _: tensors.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}))
    for name in "ab":
        edit(folder.parent / name, modules_to_save=["lm_head"])


def add_tokens(folder: Path) -> None:
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    edit_tensors(folder, lambda tensors, _: tensors.update({name: torch.ones(1, 24)}))
    edit(folder, trainable_token_indices=[3])


def turn(folder: Path) -> None:
    """The same module, sliced on the other side."""
    module = "model.layers.0.mlp.down_proj"
    slices = json.loads((folder / CONFIG).read_text())["slices"]
    edit(folder, slices={**slices, module: "out 0-1"}, base_digest=None)
    names = [f"base_model.model.{module}.s2ft_block.{part}" for part in ("weight", "indices")]
    edit_tensors(
        folder, lambda tensors, _: tensors.update(zip(names, (torch.ones(2, 44), torch.arange(2)), strict=True))
    )


DAMAGE: dict[str, Callable[[Path], object]] = {
    r"b holds no adapter": lambda b: (b / CONFIG).unlink(),
    r"is truncated or no safetensors": lambda b: (b / WEIGHTS).write_bytes((b / WEIGHTS).read_bytes()[:-9]),
    r"no safetensors file": lambda b: (b / WEIGHTS).write_bytes(b"\x80\x04\x95 a pickle, never read"),
    r"peft_type is 'LORA'": lambda b: edit(b, peft_type="LORA"),
    r"not finite": lambda b: edit_tensors(b, lambda t, n: t[n].view(-1)[0].fill_(torch.inf)),
    r"differs from the config's slice": lambda b: edit_tensors(
        b, lambda t, n: t[n.replace("weight", "indices")].add_(1)
    ),
    r"do not ascend; each may occur once": lambda b: edit(b, slices={"model.layers.0.mlp.down_proj": "in 3,3"}),
    r"no layer has so many": lambda b: edit(b, slices={"model.layers.0.mlp.down_proj": "in 3,999999999"}),
    r"has no weight for mlp.down_proj, which its config names": lambda b: edit(
        b, slices={"mlp.down_proj": "in 3"}, base_digest=None
    ),
    r"base_digest names 'nowhere'": lambda b: edit(b, base_digest={"nowhere": "ab"}),
    r"is no part of the adapter's slice": lambda b: edit(
        b, base_digest={"model.layers.0.mlp.down_proj": "in 0-43=ab; in 0=cd"}
    ),
    r"has base_model_name_or_path='x/y', but .*b has 'x/z'": lambda b: (
        edit(b.parent / "a", base_model_name_or_path="x/y"),
        edit(b, base_model_name_or_path="x/z"),
    ),
    r"a has task_type='CAUSAL_LM', but .*b has 'SEQ_CLS'": lambda b: edit(b, task_type="SEQ_CLS"),
    r"made for different bases: the slice": swap_digest,
    r"a has modules_to_save=None, but .*b has \['lm_head'\]": lambda b: edit(b, modules_to_save=["lm_head"]),
    r"a has trainable_token_indices=None, but .*b has \[3\]": add_tokens,
    r"lm_head.weight is kept whole by .*b alone": add_whole_module,
    r"down_proj: .*a changes channels of its input side, .*b of its output side": turn,
    r"was made for 24 features, .*b for 25; .*different bases": lambda b: edit_tensors(
        b, lambda t, n: t.update({n: torch.zeros(25, t[n].shape[1])})
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_bad_adapters_are_refused_before_anything_is_written(pair: list[Path], tmp_path: Path, message: str) -> None:
    DAMAGE[message](pair[1])
    with pytest.raises(S2FTError, match=message):
        s2ft.fuse(pair, output=tmp_path / "new" / "ab")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1.0]}, r"1 weights \(1.0\) are given for 2 adapters"),
        ({"weights": [1.0, float("nan")]}, r"weight nan is not a finite number"),
        ({"weights": [1.0, "x"]}, r"weight 'x' is not a finite number"),
        ({"method": "svd"}, r"method='svd' is unknown; choose from sum, ties, dare"),
        ({"density": 0.0}, r"density=0.0 is outside \(0, 1\]"),
        ({"seed": 1.5}, r"seed=1.5 is not an integer"),
        ({"weights": [1e300, 1.0]}, r"too large for torch.float32"),
        ({"adapters": []}, r"no adapters are given"),
        ({"adapters": "a"}, r"adapters='a' is one folder"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    pair: list[Path], tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(S2FTError, match=message):
        s2ft.fuse(**{"adapters": pair, "output": tmp_path / "ab", **arguments})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_adapter_is_never_overwritten(pair: list[Path], tmp_path: Path) -> None:
    before = (pair[0] / WEIGHTS).read_bytes()
    with pytest.raises(S2FTError, match="is a folder that holds files already"):
        s2ft.fuse(pair, output=pair[0])
    assert (pair[0] / WEIGHTS).read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(S2FTError, match="is a file; name a folder"):
        s2ft.fuse(pair, output=tmp_path / "file")


def test_a_failure_while_writing_leaves_nothing(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(SavedConfig, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        s2ft.fuse(pair, output=tmp_path / "ab")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_one_base_may_be_spelled_in_several_ways(
    base: nn.Module, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    (tmp_path / "other").mkdir()
    for first, second, agree in [
        ("base", "base/", True),
        ("base", str(tmp_path / "base"), True),
        ("./base", str(tmp_path / "link"), True),
        ("org/model", "org/model/", True),  # not here
        ("base", "other", False),
        ("org/model", "org/other", False),
    ]:
        for folder, name in zip(pair, (first, second), strict=True):
            fields = json.loads((folder / CONFIG).read_text())
            (folder / CONFIG).write_text(json.dumps({**fields, "base_model_name_or_path": name}))
        if agree:
            s2ft.fuse(pair)
        else:
            with pytest.raises(S2FTError, match=f"base_model_name_or_path='{first}', but .* has '{second}'"):
                s2ft.fuse(pair)


def test_other_bases_fuse_for_those_who_know_better(base: nn.Module, pair: list[Path], tmp_path: Path) -> None:
    for folder in pair:
        edit(folder, base_model_name_or_path=f"somewhere/{folder.name}")
    with any_base():
        s2ft.fuse(pair, output=tmp_path / "ab")
        load(base, tmp_path / "ab")
    assert read_adapter(tmp_path / "ab").config.base_model_name_or_path == "somewhere/a"


def test_equal_whole_modules_are_kept(base: nn.Module, tmp_path: Path) -> None:
    pair = [save(base, tmp_path / name, seed=seed, modules_to_save=["lm_head"]) for seed, name in enumerate("ab")]
    s2ft.fuse(pair, [0.5, 0.5], output=tmp_path / "ab")
    whole = read_adapter(tmp_path / "ab").others
    assert whole
    assert all(torch.equal(tensor, read_adapter(pair[0]).others[name]) for name, tensor in whole.items())
    load(base, tmp_path / "ab")
    edit_tensors(pair[1], lambda tensors, _: tensors["base_model.model.lm_head.weight"].view(-1)[0].add_(1))
    with pytest.raises(S2FTError, match=r"lm_head.weight is kept whole by .*a and .*b, and differs"):
        s2ft.fuse(pair)


def test_an_open_adapter_is_what_a_read_one_is(pair: list[Path]) -> None:
    opened, read = open_adapter(pair[0]), read_adapter(pair[0])
    assert opened.config == read.saved
    assert opened.shapes == {module: tuple(delta.shape) for module, delta in read.deltas.items()}
    assert all(torch.equal(opened.delta(module), delta) for module, delta in read.deltas.items())


def write(folder: Path, slices: dict[str, str], deltas: dict[str, torch.Tensor]) -> Path:
    """An adapter by hand."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, text in slices.items():
        tensors[f"base_model.model.{module}.s2ft_block.weight"] = deltas[module].contiguous()
        tensors[f"base_model.model.{module}.s2ft_block.indices"] = torch.from_numpy(Slice.parse(text).indices)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    S2FTConfig(slices=slices, target_modules=set(slices)).save_pretrained(str(folder))
    return folder


def test_the_report_against_plain_numbers(tmp_path: Path) -> None:
    module = "model.layers.2.mlp.down_proj"
    a, b = torch.randn(7, 3), torch.randn(7, 4)
    folders = [
        write(tmp_path / "a", {module: "in 1,4-5"}, {module: a}),
        write(tmp_path / "b", {module: "in 0,4-6"}, {module: b}),
        write(tmp_path / "c", {"other": "out 3"}, {"other": torch.randn(1, 5)}),
    ]
    fusion = s2ft.fuse(folders, [2.0, -0.5, 1.0])
    (row,) = fusion.overlaps
    ours, theirs = a[:, 1:].double().flatten(), b[:, 1:3].double().flatten()
    assert (row.layer, row.side, row.first, row.second) == (2, "in", 0, 1)
    assert (row.first_channels, row.second_channels, row.shared, row.share) == (3, 4, 2, 2 / 5)
    assert row.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)), abs=1e-5)
    assert row.sign_conflict == pytest.approx(float((ours * theirs < 0).double().mean()))
    assert row.interference_on_first == pytest.approx(0.5 * float(theirs.norm()) / (2 * float(a.double().norm())))
    assert row.interference_on_second == pytest.approx(2 * float(ours.norm()) / (0.5 * float(b.double().norm())))
    assert table(fusion.overlaps).row_count == 1
    draw(fusion.overlaps, tmp_path / "o.png")
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    assert s2ft.fuse(folders, [0.0, 1.0, 1.0]).overlaps[0].interference_on_first is None


def test_layers_that_lie_directly_in_the_block_have_one_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    modules = [f"model.decoder.layers.{n}.{name}" for n in range(3) for name in ("fc1", "self_attn.out_proj")]
    slices, deltas = dict.fromkeys(modules, "in 1,4-5"), {module: torch.randn(7, 3) for module in modules}
    draw(s2ft.fuse([write(tmp_path / name, slices, deltas) for name in "ab"]).overlaps, tmp_path / "o.png")
    labels = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert sorted(labels) == ["fc1", "self_attn.out_proj"]


def test_three_adapters_are_reported_pair_by_pair(base: nn.Module, pair: list[Path], tmp_path: Path) -> None:
    third = save(base, tmp_path / "c", ratios={"down_proj": 0.9})
    rows = s2ft.fuse([*pair, third]).overlaps
    assert len(rows) == 3 + 3 * 3  # o_proj of two adapters, down_proj of three, in three layers
    assert [row.layer for row in rows] == sorted(row.layer for row in rows)


def test_the_command_reports_draws_and_writes(base: nn.Module, pair: list[Path], tmp_path: Path) -> None:
    png, rows = tmp_path / "o.png", tmp_path / "o.json"
    arguments = [*map(str, pair), "--weights", "0.5,0.25", "--method", "ties", "--density", "0.6"]
    outputs = ["--output", str(tmp_path / "ab"), "--png", str(png), "--json", str(rows)]
    result = CliRunner().invoke(app, ["fuse", *arguments, *outputs])
    assert result.exit_code == 0, result.output
    assert "mlp.down_proj" in result.output
    facts = json.loads(rows.read_text())
    assert (facts["weights"], facts["method"], facts["density"]) == ([0.5, 0.25], "ties", 0.6)
    assert facts["shared"] == sum(row["shared"] for row in facts["rows"]) > 0
    assert f"{facts['shared']:,} of {facts['channels']:,} channels" in result.output
    assert png.read_bytes().startswith(b"\x89PNG")
    expected = s2ft.fuse(pair, [0.5, 0.25], "ties", 0.6).tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(tmp_path / "ab" / WEIGHTS).items())
    assert torch.isfinite(load(base, tmp_path / "ab")(tokens(1, 4)).logits).all()


@pytest.mark.parametrize("terminal", [False, True])
def test_the_table_is_whole_at_any_width(pair: list[Path], terminal: bool) -> None:
    rows = s2ft.fuse(pair).overlaps
    console = Console(file=io.StringIO(), width=40, force_terminal=terminal, no_color=True)
    print_table(table(rows), console)
    printed = console.file.getvalue()
    assert "…" not in printed
    assert printed.count("self_attn.o_proj") == printed.count("mlp.down_proj") == 3
    for row in rows:
        assert f"{row.interference_on_first:.2f}, {row.interference_on_second:.2f}" in printed
    assert "interference" in printed


def test_the_command_without_an_output_only_reports(pair: list[Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["fuse", *map(str, pair)])
    assert result.exit_code == 0, result.output
    assert "channels in 6 modules are shared" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_the_command_with_bad_weights(pair: list[Path]) -> None:
    result = CliRunner().invoke(app, ["fuse", *map(str, pair), "--weights", "0.5;0.5"])
    assert isinstance(result.exception, S2FTError)
    assert "weights='0.5;0.5' is not a list of numbers" in str(result.exception)


MEMORY = """
import resource, sys
from pathlib import Path
import s2ft
folders = [Path(name) for name in sys.argv[1:3]]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
s2ft.fuse(folders, [0.5, 0.5], output=sys.argv[3])
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs")
def test_memory_stays_below_twice_the_adapters(tmp_path: Path) -> None:
    modules = [f"model.layers.{layer}.mlp.down_proj" for layer in range(16)]
    for seed, name in enumerate("ab"):
        generator = np.random.default_rng(seed)
        slices = {module: str(Slice("in", np.sort(generator.choice(4096, 256, replace=False)))) for module in modules}
        write(tmp_path / name, slices, {module: torch.randn(2048, 256) for module in modules})
    size = sum((tmp_path / name / WEIGHTS).stat().st_size for name in "ab")
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, *(str(tmp_path / name) for name in ("a", "b", "ab"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 2 * size
