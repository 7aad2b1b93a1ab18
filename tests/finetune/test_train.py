"""`train`: what a run changes, leaves behind, survives, and refuses."""

import errno
import json
import re
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from adapter_files import PREFIX, WEIGHTS, flip, write_tensors
from families import FAMILIES, build
from live import same
from s2ft import S2FTError
from s2ft.adapters.file import read_adapter
from s2ft.data import packing
from s2ft.data.examples import load_examples
from s2ft.finetune.arguments import trainer_config
from s2ft.finetune.options import TrainOptions, parse_options, read_config, to_yaml
from s2ft.finetune.recipe import settle_batch
from s2ft.finetune.resume import Note, Paused
from s2ft.finetune.trainer import Flow, Trainer
from s2ft.runtime.precision import choose_precision
from tiny_runs import interrupt_at, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(base, data, tmp_path):
    """Trains for eight short steps, unless told otherwise."""

    def call(output: str = "out", **options):
        settings = {"max_steps": 8, "gradient_accumulation": 2, "learning_rate": 1e-2, "ratios": 0.25, "log_every": 1}
        settings |= {"precision": "fp32", "layout": "in-place"}
        return train(
            parse_options({"model": base, "data": data, "output": str(tmp_path / output), **settings, **options})
        )

    return call


def counted(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, told: Any = lambda *_, **__: None) -> list[Any]:
    """A list that each call of a method adds to."""
    calls, method = [], getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(told(*args, **kwargs))
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in found.items() if name.endswith("weight")}  # the indices lie beside them


def test_a_run_lowers_the_loss_and_changes_nothing_but_deltas(run, base):
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    result = run()
    losses = [loss for _, loss in result.card["loss_curve"]]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.1
    after = {
        name.replace(".base_layer", ""): tensor for name, tensor in result.model.get_base_model().state_dict().items()
    }
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trained = [name for name, parameter in result.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".s2ft_" in name for name in trained)
    assert all(tensor.abs().sum() > 0 for tensor in deltas(result.output).values())


def test_nothing_about_a_run_is_sent_to_the_hub(run, monkeypatch):
    """TRL reports each trainer; by the Hub's switch, which it asks each time, nothing leaves the machine."""
    switched_off = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(
        "trl.trainer.base_trainer.send_telemetry",
        lambda *_, **__: switched_off.append(constants.HF_HUB_DISABLE_TELEMETRY),
    )
    run(max_steps=1)
    assert switched_off == [True]
    assert constants.HF_HUB_DISABLE_TELEMETRY is False  # as it was


def test_the_adapter_loads_onto_its_base_and_says_how(run, base):
    result = run(max_steps=2)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.output)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, result.model.eval()(ids).logits)
    readme = (result.output / "README.md").read_text()
    assert readme.index("import s2ft") < readme.index("from peft import PeftModel")
    assert "base_model:" not in readme  # the base is a local folder, which the Hub would look for in vain
    assert not list(result.output.glob("checkpoint-*"))


@pytest.mark.parametrize(
    "options",
    [{}, {"packing": True, "max_length": 64}, {"layout": "indexed"}, {"precision": "pure-bf16", "limit": 8}],
    ids=["padded", "packed", "indexed", "bf16 alone"],
)
def test_a_resumed_run_ends_in_the_same_weights(run, tmp_path, monkeypatch, options):
    whole = run("whole", save_every=3, **options)
    interrupt_at(monkeypatch, 3)
    paused = run("paused", save_every=50, **options)
    assert paused.interrupted
    assert [path.name for path in paused.output.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not same(deltas(paused.output), deltas(whole.output))
    monkeypatch.undo()
    steps = counted(monkeypatch, Flow, "on_step_begin", lambda flow, args, state, *_, **__: state.global_step)
    resumed = run("paused", save_every=50, resume=True, **options)
    assert steps == [3, 4, 5, 6, 7], "a run that began anew would end in the same weights"
    assert not resumed.interrupted
    assert same(deltas(resumed.output), deltas(whole.output))
    assert resumed.card["loss_curve"] == whole.card["loss_curve"]
    assert resumed.card["training"]["resumed_from"] == "checkpoint-3"
    assert resumed.card["training"]["tokens"] == whole.card["training"]["tokens"], "of both parts"


def test_the_card_of_a_resumed_run_has_the_time_of_both_parts_and_the_reasons_of_the_first(run, monkeypatch):
    interrupt_at(monkeypatch, 2)
    paused = run(learning_rate=None, batch_size=None)
    monkeypatch.undo()
    note = paused.output / "checkpoint-2" / "run.json"
    told = json.loads(note.read_text())
    assert 0 < told["seconds"] < 60
    note.write_text(json.dumps({**told, "seconds": told["seconds"] + 1000}))
    training = run(learning_rate=None, batch_size=None, resume=True).card["training"]
    assert 1000 < training["seconds"] < 1100
    for name in ("learning_rate_reason", "batch"):
        assert training[name] == paused.card["training"][name] != "as asked"


def test_of_a_run_whose_first_parts_were_not_timed_only_the_last_counts(run, monkeypatch):
    """As a checkpoint of an older version."""
    whole = run("whole")
    interrupt_at(monkeypatch, 6)
    note = run().output / "checkpoint-6" / "run.json"
    monkeypatch.undo()
    note.write_text(
        json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k not in ("seconds", "parts")})
    )
    training = run(resume=True).card["training"]
    assert 0 < training["tokens"] < whole.card["training"]["tokens"] / 2
    assert training["seconds"] < 60


def test_a_part_that_logged_less_than_the_next_is_counted(run, monkeypatch):
    whole = run("whole")
    interrupt_at(monkeypatch, 1)
    run(log_every=5)
    monkeypatch.undo()
    assert run(log_every=5, resume=True).card["training"]["tokens"] == whole.card["training"]["tokens"]


def test_a_resumed_run_saves_and_logs_as_often_as_it_is_told_now(run, monkeypatch):
    interrupt_at(monkeypatch, 1)
    run(save_every=50, log_every=50)
    monkeypatch.undo()
    saved = []
    write = Note.write
    monkeypatch.setattr(
        Note, "write", lambda note, path, seconds: (saved.append(path.name), write(note, path, seconds))
    )
    resumed = run(save_every=2, log_every=1, resume=True)
    assert saved == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert [step for step, _ in resumed.card["loss_curve"]] == [*range(1, 9)]


def test_a_resumed_run_must_be_the_same_run(run, data, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2)
    run(max_steps=4)
    monkeypatch.undo()
    with pytest.raises(S2FTError) as caught:
        run(max_steps=4, resume=True, learning_rate=0.5, ratios=0.5)
    assert re.search(r"learning_rate=0\.5, but \S+ was made with learning_rate=0\.01$", str(caught.value))
    assert "made with ratios=0.25" in str(caught.value)
    with pytest.raises(S2FTError, match="add --resume"):
        run(max_steps=4)
    run(max_steps=4, resume=True)
    with pytest.raises(S2FTError, match="finished run"):
        run(max_steps=4, resume=True)
    with pytest.raises(S2FTError, match="no checkpoint to resume"):
        run("other", resume=True)


def test_a_damaged_checkpoint_is_not_resumed(run, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2)
    run()
    monkeypatch.undo()
    weights = tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(S2FTError, match=r"adapter_model\.safetensors is damaged"):
        run(resume=True)
    weights.unlink()
    with pytest.raises(S2FTError, match=r"checkpoint-2 is incomplete: it has no adapter_model\.safetensors"):
        run(resume=True)


def within_a_tensor(file: Path) -> int:
    """A place in the largest part of a file of torch's, which is a zip archive: what pads the parts has no checksum."""
    with zipfile.ZipFile(file) as archive:
        part = max(archive.infolist(), key=lambda part: part.file_size)
    start = part.header_offset
    lengths = struct.unpack("<HH", file.read_bytes()[start + 26 : start + 30])  # of the name, and of what pads
    return start + 30 + sum(lengths) + part.file_size // 2


DAMAGE = {
    r"neither a slice nor what the config declares": lambda folder: write_tensors(
        folder, {**load_file(folder / WEIGHTS), PREFIX + "model.norm.weight": torch.full((32,), 7.0)}
    ),
    r"its checksum differs": lambda folder: flip(folder / WEIGHTS, -9),
    r"optimizer\.pt is damaged": lambda folder: flip(folder / "optimizer.pt", within_a_tensor(folder / "optimizer.pt")),
    r"scheduler\.pt is damaged": lambda folder: (folder / "scheduler.pt").write_bytes(b"\x80\x04."),
    r"optimizer\.pt is damaged: it holds no state": lambda folder: torch.save([1], folder / "optimizer.pt"),
    r"incomplete: it has no rng_state\.pth": lambda folder: (folder / "rng_state.pth").unlink(),
}


def test_what_was_changed_in_a_checkpoint_is_not_resumed(run, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2)
    run()
    monkeypatch.undo()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    shutil.copytree(checkpoint, tmp_path / "sound")
    for message, damage in DAMAGE.items():
        shutil.rmtree(checkpoint)
        shutil.copytree(tmp_path / "sound", checkpoint)
        damage(checkpoint)
        with pytest.raises(S2FTError, match=message):
            run(resume=True)


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"options": null, "data": null}', '{"options": {}, "data": {}}'])
def test_a_note_of_another_form_is_no_checkpoint(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(S2FTError, match=r"run\.json cannot be read, so this is no checkpoint"):
        Paused.read(tmp_path)


def test_changed_data_is_not_resumed(run, data, tmp_path, monkeypatch):
    copy = tmp_path / "copy.json"
    copy.write_text(Path(data).read_text())
    interrupt_at(monkeypatch, 2)
    run(data=str(copy))
    monkeypatch.undo()
    copy.write_text(Path(data).read_text().replace("sum", "result"))
    with pytest.raises(S2FTError, match="has changed since"):
        run(data=str(copy), resume=True)


def test_a_checkpoint_that_fails_half_way_leaves_the_older_one(run, tmp_path, monkeypatch):
    save = Trainer._save_rng_state

    def full_disk(self, folder):
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(Trainer, "_save_rng_state", full_disk)
    with pytest.raises(S2FTError, match="no space left on the disk"):
        run(save_every=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    assert same(deltas(run(save_every=2, resume=True).output), deltas(run("whole").output))


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over_and_removed(run, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2)
    run(max_steps=4)
    monkeypatch.undo()
    half, only = tmp_path / "out" / "checkpoint-3", tmp_path / "other" / "checkpoint-3"
    for folder in (half, only):
        shutil.copytree(tmp_path / "out" / "checkpoint-2", folder)
        (folder / "unfinished").touch()
        (folder / WEIGHTS).write_bytes(b"")
    resumed = run(max_steps=4, resume=True)
    assert resumed.card["training"]["resumed_from"] == "checkpoint-2"
    new = run("other", max_steps=4)  # a folder with nothing else is free
    assert same(deltas(new.output), deltas(resumed.output))
    assert not half.exists()
    assert not only.exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_lower_and_leaves_nothing(run, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Trainer, "training_step", fail)
    with pytest.raises(S2FTError, match=r"out of memory: lower batch_size=4 or max_length"):
        run("new/out")
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_no_number_stops_the_run(run, tmp_path, monkeypatch):
    def nan(self, model, inputs, **_):
        return sum(parameter.sum() for parameter in model.parameters()) * torch.nan

    monkeypatch.setattr(Trainer, "compute_loss", nan)
    with pytest.raises(S2FTError, match=r"the loss is nan at step 1.*lower learning_rate=0.01"):
        run()
    assert not (tmp_path / "out").exists()


def test_the_same_data_draws_the_same_channels_and_other_data_others(run, data, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(Path(data).read_text().replace("sum", "result"))
    drawn = {"strategy": "random", "max_steps": 1}
    slices = [run(name, **drawn, **options).model.peft_config["default"].slices for name, options in (
        ("a", {}), ("b", {}), ("c", {"data": str(other)}), ("d", {"seed": 5}))]  # fmt: skip
    assert slices[0] == slices[1]
    assert slices[0] != slices[2]
    assert slices[0] != slices[3]


def test_channels_are_drawn_unless_a_strategy_is_named(run):
    cards = {name: run(name, max_steps=1, **options).card["selection"] for name, options in (
        ("open", {}), ("weight", {"strategy": "weight"}), ("paper", {"recipe": "paper"}), ("seed", {"seed": 5}))}  # fmt: skip
    assert cards["weight"] == {"strategy": "weight", "subset": "largest", "modules": 4}
    assert cards["open"] == cards["paper"] == {**cards["seed"], "seed": cards["open"]["seed"]}
    assert {cards["paper"]["strategy"], cards["seed"]["strategy"]} == {"random"}
    assert cards["seed"]["seed"] == 5 != cards["open"]["seed"]


@pytest.mark.parametrize("strategy", ["activation", "product", "gradient"])
def test_strategies_that_need_data_are_calibrated_on_the_training_data(run, strategy):
    result = run(strategy, strategy=strategy, max_steps=1, calibration=0.2)
    assert result.card["selection"] == {"strategy": strategy, "subset": "largest", "modules": 4}


def test_bf16_keeps_fp32_deltas_on_a_bf16_base(run):
    result = run(precision="bf16", max_steps=4)
    kinds = {parameter.requires_grad: parameter.dtype for parameter in result.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert {tensor.dtype for tensor in deltas(result.output).values()} == {torch.float32}
    assert result.card["loss_curve"][-1][1] < result.card["loss_curve"][0][1]


def test_bf16_alone_trains_bf16_deltas_in_steps_that_bf16_would_lose(run):
    result = run(precision="pure-bf16", max_steps=8, learning_rate=3e-3)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in deltas(result.output).values()} == {torch.bfloat16}
    assert read_adapter(result.output).parameters > 0
    assert result.card["loss_curve"][-1][1] < result.card["loss_curve"][0][1]


def test_gradient_checkpointing_gives_the_same_weights(run, monkeypatch):
    passes = counted(monkeypatch, LlamaAttention, "forward")
    plain, count = run("plain", max_steps=2), len(passes)
    checkpointed = run("less", max_steps=2, gradient_checkpointing=True)
    assert len(passes) - count > count, "backward computes blocks anew"
    for name, delta in deltas(plain.output).items():
        torch.testing.assert_close(deltas(checkpointed.output)[name], delta, rtol=1e-4, atol=1e-6)


def test_packed_rows_have_their_loss_on_responses_only(base, data, tmp_path):
    options = {
        "model": base,
        "data": data,
        "output": str(tmp_path / "out"),
        "packing": True,
        "max_length": 64,
        "max_steps": 1,
    }
    result = train(parse_options({**options, "ratios": 0.25, "gradient_accumulation": 1, "precision": "fp32"}))
    assert result.card["training"]["final_loss"] > 0
    tokenizer = result.tokenizer
    rows = packed_rows(options, tokenizer)
    assert any(len(row["seq_lengths"]) > 1 for row in rows)
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            ids, labels = (row[name][start : start + length] for name in ("input_ids", "labels"))
            prompt, _, completion = tokenizer.decode(ids).partition("=")
            assert labels == [-100] * (len(prompt) + 1) + ids[len(prompt) + 1 :]
            assert completion.endswith("which is the sum<eos>")
            start += length


def packed_rows(options, tokenizer):
    from trl import pack_dataset

    from s2ft.data.tokens import tokenize

    tokens = tokenize(load_examples(options["data"]), tokenizer, 64)
    return pack_dataset(
        tokens.dataset,
        64,
        trainer_config(settle_batch(parse_options(options), 1).options, max_length=64).packing_strategy,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_do_not_see_each_other_in_any_family(family):
    packing.check_packing(build(family).eval())


def test_a_model_whose_packed_examples_see_each_other_is_refused(base, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(base)
    packing.check_packing(model)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **given: forward(**{**given, "position_ids": None}))
    with pytest.raises(S2FTError, match="see each other"):
        packing.check_packing(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "./nowhere"}, r"model='./nowhere' is not a folder"),
        ({"data": "./nowhere.json"}, r"nowhere.json': there is no such file"),
        ({"max_length": 100_000}, "max_length=100000 is more than the 512 positions"),
        ({"ratios": None, "budget": 1e-6}, "budget"),
        ({"avoid": "./nothing"}, "avoid names './nothing'"),
        ({"max_length": 3}, "none of the 40 examples is left"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(run, tmp_path, options, message):
    with pytest.raises(S2FTError, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_in_use_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(S2FTError, match="exists and is not empty"):
        run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_what_a_run_leaves_that_ended_before_its_first_checkpoint_does_not_stop_the_next(run, tmp_path):
    left = [tmp_path / "out" / "answers" / "base" / "gsm8k.jsonl", tmp_path / "out" / "runs" / "events.out.tfevents.1"]
    for file in left:
        file.parent.mkdir(parents=True)
        file.touch()
    assert run(max_steps=1).card["status"] == "finished"
    own = tmp_path / "own" / "answers" / "mine.txt"
    own.parent.mkdir(parents=True)
    own.touch()
    with pytest.raises(S2FTError, match=r"output=\S+ exists and is not empty"):
        run("own", max_steps=1)


def test_an_output_folder_that_cannot_be_made_is_named(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(S2FTError, match="is a file, not a folder"):
        run("file/out")
    with pytest.raises(S2FTError, match="is a file"):
        run("file")


def test_a_broken_model_folder_is_named(run, base, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    with pytest.raises(S2FTError, match=r"without config\.json"):
        run(model=str(folder))
    for path in Path(base).iterdir():
        (folder / path.name).write_bytes(path.read_bytes()[: 5000 if path.suffix == ".safetensors" else None])
    with pytest.raises(S2FTError, match="its model cannot be loaded"):
        run(model=str(folder))


def test_all_wrong_options_are_reported_at_once():
    wrong = {"epochs": "many", "batch_size": 0, "subset": "best", "optim": "sdg"}
    with pytest.raises(S2FTError) as caught:
        parse_options({**wrong, "data": "d.json", "output": "o", "epoch": 3})
    text = str(caught.value)
    for part in (
        "7 problems:", "data='d.json': there is no such file", "model is missing", "epochs='many'", "batch_size=0",
        "subset='best' is unknown; choose from largest",
        "optim='sdg': unknown; choose from adamw_torch", "epoch=3: no such option; did you mean epochs?",
    ):  # fmt: skip
        assert part in text


MISSING = {
    "model": "./no-model",
    "data": ["no.json", "./no-folder", "text"],
    "evaluate": "gsm8k",
    "eval_data": "./none",
}
ABSENT = (
    "no.json': there is no such file",
    "'./no-folder': there is no",
    "'text' names no data set",
    "'./no-model' is not",
    "./none",
)


def test_files_that_are_not_there_are_told_with_wrong_options():
    with pytest.raises(S2FTError) as caught:
        parse_options({**MISSING, "output": "o", "epochs": 0})
    assert "6 problems:" in str(caught.value)
    assert all(part in str(caught.value) for part in ("epochs=0", *ABSENT))


def test_all_that_is_not_there_is_told_at_once(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(S2FTError) as caught:
        train(parse_options({**MISSING, "output": str(tmp_path / "out")}))
    assert "6 problems:" in str(caught.value)
    assert all(part in str(caught.value) for part in ("exists and is not empty", *ABSENT))


def test_options_of_lora_are_explained():
    with pytest.raises(S2FTError) as caught:
        parse_options({"model": "m", "data": "d", "output": "o", "r": 8, "lora_dropout": 0.1})
    assert "r=8: S²FT has no rank; how much is trained is `ratios`" in str(caught.value)
    assert "lora_dropout=0.1: there is no dropout" in str(caught.value)
    with pytest.raises(S2FTError, match=r"^lora_rnk=8: no such option; did you mean lora_rank\?$"):
        parse_options({"model": "m", "data": "d", "output": "o", "method": "lora", "lora_rnk": 8})
    with pytest.raises(S2FTError, match=r"^r=8: no such option$"):
        parse_options({"model": "m", "data": "d", "output": "o", "method": "lora", "r": 8})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ratios", True, "ratios=True: a number is wanted, not true/false"),
        ("ratios", {"o_proj": True}, "a number is wanted, not true/false"),
        ("layers", [True], "layers=[True]: a number is wanted, not true/false"),
        ("seed", True, "seed=True: a number is wanted, not true/false"),
        ("strategy", False, "strategy=False: text is wanted, not true/false"),
        ("ratios", "o_proj=0.1,o_proj=0.9", "names o_proj more than once"),
        ("output", "", "output='': must not be empty"),
        ("model", " ", "model=' ': must not be empty"),
        ("data", ["d", ""], "data=['d', '']: must not be empty"),
        ("subset", "smallest", "subset='smallest' goes by scores, and without strategy channels are drawn"),
        ("target_modules", "", "target_modules='': must not be empty"),
        ("target_modules", "(q|o", "target_modules='(q|o' is no regular expression: missing ), unterminated"),
        ("avoid", "a\0b", "must not hold the character NUL"),
        ("output", "a\0b", "must not hold the character NUL"),
    ],
)
def test_a_wrong_value_is_reported_beside_the_others(name, value, message):
    with pytest.raises(S2FTError) as caught:
        parse_options({"model": "m", "data": "d", "output": "o", "epochs": 0, name: value})
    assert "2 problems:" in str(caught.value)
    assert message in str(caught.value)


def test_options_are_read_from_text():
    paths = {"model": "m", "data": "d", "output": "o"}
    options = parse_options({**paths, "ratios": "o_proj=0.5, down_proj=0.1", "layers": "1,2", "avoid": "a,b"})
    assert options.ratios == {"o_proj": 0.5, "down_proj": 0.1}
    assert (options.layers, options.avoid, options.data) == ([1, 2], ["a", "b"], ["d"])
    assert options.s2ft_config(seed=3).seed == 3
    assert parse_options({**paths, "strategy": "random"}).s2ft_config(seed=3).seed == 3
    assert parse_options({**paths, "strategy": "weight"}).s2ft_config(seed=3).seed is None
    assert parse_options({**paths, "layers": "last:50%", "seed": "9"}).s2ft_config(seed=3).seed == 9


def test_options_survive_their_yaml(tmp_path):
    options = TrainOptions(model="m", data=["a", "b"], output="o", ratios={"o_proj": 0.5}, layers=[1, 2])
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(options))
    assert parse_options(read_config(str(path))) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2", "run.yaml:2: malformed"),
        ("- a", "run.yaml:1: expected"),
        ("", "run.yaml:1: expected"),
        ("&a [*a]", "run.yaml:1: expected"),
    ],
)
def test_a_bad_yaml_file_is_said_with_its_line(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(S2FTError, match=message):
        read_config(str(path))


def test_options_reach_the_trainer():
    odd = {"weight_decay": 0.25, "clip": 0.75, "schedule": "cosine", "optim": "adamw_torch_fused", "train_seed": 7}
    options = parse_options(
        {"model": "m", "data": "d", "output": "o", **odd, "gradient_checkpointing": True, "epochs": 2.5}
    )
    found = trainer_config(settle_batch(options, 200).options, max_length=8)
    assert (found.adam_beta1, found.adam_beta2) == (0.9, 0.95)
    assert (found.weight_decay, found.max_grad_norm, found.lr_scheduler_type, found.optim) == tuple(odd.values())[:4]
    assert (found.seed, found.gradient_checkpointing, found.num_train_epochs) == (7, True, 2.5)


def test_precision_gives_its_reason():
    assert choose_precision("bf16") == (torch.bfloat16, "bf16, as asked")
    dtype, reason = choose_precision("auto")
    assert dtype in (torch.bfloat16, torch.float32)
    assert reason.startswith("auto-detected: ")
