"""A whole evaluation: answers are kept and not asked twice, counts are right, errors are no wrong answers."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from markupsafe import escape
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from s2ft import S2FTConfig, S2FTError
from s2ft.cli.app import app
from s2ft.cli.progress import quiet
from s2ft.data.prompts import alpaca_prompt
from s2ft.evaluate import run as work
from s2ft.evaluate.answers import Answers, read_answers
from s2ft.evaluate.comparison import Scorer, check_scores, score, section
from s2ft.evaluate.engines import Answer, TransformersEngine
from s2ft.evaluate.options import EvalOptions, find_subjects
from s2ft.evaluate.questions import digest, load_questions
from s2ft.evaluate.run import evaluate
from s2ft.evaluate.subjects import Models, fingerprint, load_adapter
from s2ft.evaluate.tally import wilson
from s2ft.evaluate.tasks import DECODING, TASKS, Decoding
from s2ft.finetune.card import to_markdown
from s2ft.finetune.options import parse_options
from s2ft.finetune.train import train
from s2ft.runtime.models import load_model, load_tokenizer
from tiny_base import CHAT_TEMPLATE, byte_tokenizer, save_tiny_base

RUN = {"model": "m"}
TRAINED = ("chat", "alpaca", "text")  # formats of data
QUICK = ["--max-new-tokens", "4", "--beams", "1", "--precision", "fp32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    numbers = [{"instruction": f"Add {n} and {n}.", "input": "", "answer": f"{2 * n}.0"} for n in range(7)]
    truths = [{"instruction": f"Is {n} even?", "answer": "true" if n % 2 == 0 else "false"} for n in range(5)]
    letters = [{"instruction": f"Pick {letter}.", "answer": letter} for letter in "ABC"]
    for name, records in (("gsm8k", numbers), ("boolq", truths), ("AQuA", letters)):
        (folder / "dataset" / name).mkdir(parents=True)
        (folder / "dataset" / name / "test.json").write_text(json.dumps(records))
    return str(folder)


@pytest.fixture
def short(monkeypatch) -> None:
    for suite in ("commonsense", "arithmetic"):
        monkeypatch.setitem(DECODING, suite, Decoding(1, 4))


def options(base: str, data: str, output: Path, *tasks: str, **more) -> EvalOptions:
    plain = {"max_new_tokens": 4, "beams": 1, "precision": "fp32", "batch_size": 2}
    return EvalOptions(model=base, task=list(tasks), data=data, output=output, **{**plain, **more})


def adapters(base: str, folder: Path) -> list[str]:
    """One S²FT adapter and one of LoRA, both with random values."""
    configs = {"ours": S2FTConfig(ratios=0.5, init_weights=False), "lora": LoraConfig(r=4, init_lora_weights=False)}
    for name, config in configs.items():
        model = get_peft_model(load_model(base, torch.float32), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                # The same in every run, and enough to change what is said
                parameter.data.normal_(std=2.0, generator=torch.Generator().manual_seed(len(name)))
        model.save_pretrained(folder / name)
    return [str(folder / name) for name in configs]


def says(monkeypatch, *texts: str | None) -> list[list[int]]:
    """Engines answer with these texts, in the order of the questions; None is an error. Returns what was asked."""
    asked: list[list[int]] = []

    def answers(self, prompts, decoding, done=()):
        for index, _ in enumerate(prompts):
            if index not in done:
                asked.append(prompts[index])
                text = texts[index % len(texts)]
                yield [(index, Answer(text, error="lost" if text is None else None))]

    monkeypatch.setattr(TransformersEngine, "answers", answers)
    return asked


def test_answers_are_read_counted_and_kept(base, data, tmp_path, monkeypatch) -> None:
    says(monkeypatch, "A sum: the answer is 0", "The answer is (B), 2", None, "6, false", "8.0004", "10.01", "true")
    report = evaluate(options(base, data, tmp_path, "gsm8k", "aqua", "boolq"))
    found = {row["task"]: row for row in report.rows}
    assert list(found) == ["boolq", "gsm8k", "aqua", "aqua (strict)"]
    names = ("answered", "errors", "unread", "correct", "accuracy")
    assert [found["gsm8k"][name] for name in names] == [6, 1, 1, 4, 4 / 6]
    assert [found["boolq"][name] for name in names] == [4, 1, 3, 1, 1 / 4]
    assert [found["aqua"][name] for name in names] == [2, 1, 0, 2, 1]  # "A sum": the first capital is right by luck
    assert [found["aqua (strict)"][name] for name in names] == [2, 1, 1, 1, 1 / 2]
    assert report.errors == 3
    assert {row["suite"]: row["accuracy"] for row in report.means} == pytest.approx(
        {"commonsense": 1 / 4, "arithmetic": 5 / 6}
    )
    lines = [json.loads(line) for line in (tmp_path / "base" / "gsm8k.jsonl").read_text().splitlines()]
    assert lines[0]["run"]["model"] == fingerprint(base, "config.json")
    assert (lines[5]["output"], lines[5]["extracted"], lines[5]["gold"]) == ("8.0004", "8.0004", "8.0")
    assert lines[3] == {**lines[3], "output": None, "error": "lost"}


@pytest.mark.parametrize(
    "name", ["model.gguf", "chat_template.jinja", "tokenizer.model", "merges.txt", "config.json", "vocab.json"]
)
def test_another_file_is_another_model(name, tmp_path) -> None:
    (tmp_path / name).write_text("1")
    before = fingerprint(str(tmp_path), "config.json")
    (tmp_path / "README.md").write_text("words")
    assert fingerprint(str(tmp_path), "config.json") == before
    (tmp_path / name).write_text("2")
    assert fingerprint(str(tmp_path), "config.json") != before


def test_who_saved_a_model_and_what_lies_beside_it_is_no_other_model(tmp_path) -> None:
    for name in ("config.json", "adapter_config.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_text("1")
        found = set()
        for version in ("5.17", "5.23"):
            (folder / name).write_text(json.dumps({"transformers_version": version, "peft_version": version, "r": 8}))
            found.add(fingerprint(str(folder), name))
            (folder / "scores.json").write_text("[]")
        assert len(found) == 1
        (folder / name).write_text(json.dumps({"transformers_version": "5.23", "r": 9}))
        assert fingerprint(str(folder), name) not in found


def test_an_interrupted_run_goes_on_to_the_same_table(base, data, tmp_path, monkeypatch) -> None:
    names = ("gsm8k", "boolq")
    whole = evaluate(options(base, data, tmp_path / "whole", *names))
    generate, calls = TransformersEngine._generate, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *arguments)

    monkeypatch.setattr(TransformersEngine, "_generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options(base, data, tmp_path / "cut", *names))
    kept = (tmp_path / "cut" / "base" / "boolq.jsonl").read_bytes()
    assert kept.count(b"\n") == 5  # the run, and two batches of two
    with (tmp_path / "cut" / "base" / "boolq.jsonl").open("ab") as file:
        file.write(b'{"id": "torn')
    resumed = evaluate(options(base, data, tmp_path / "cut", *names))
    assert len(calls) == 3 + 1 + 4
    assert resumed.rows == whole.rows
    assert resumed.means == whole.means
    for name in names:
        files = [tmp_path / folder / "base" / f"{name}.jsonl" for folder in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_done_is_only_counted_and_errors_are_asked_again(base, data, tmp_path, monkeypatch) -> None:
    asked = says(monkeypatch, "0", None)
    assert evaluate(options(base, data, tmp_path, "gsm8k")).errors == 3
    assert len(asked) == 7
    asked.clear()
    says(monkeypatch, "4")
    asked = says(monkeypatch, "4")
    report = evaluate(options(base, data, tmp_path, "gsm8k", batch_size=5))
    assert len(asked) == 3
    assert report.rows[0]["errors"] == 0
    monkeypatch.setattr(work.Models, "base", property(lambda self: pytest.fail("the model is not needed")))
    assert evaluate(options(base, data, tmp_path, "gsm8k")).rows == report.rows


@pytest.mark.parametrize(
    "change", [{"beams": 2}, {"limit": 3}, {"max_new_tokens": 5}, {"precision": "bf16"}, {"prompt": "chat"}]
)
def test_other_options_are_another_run(base, data, tmp_path, monkeypatch, change) -> None:
    says(monkeypatch, "0")
    evaluate(options(base, data, tmp_path, "gsm8k"))
    before = (tmp_path / "base" / "gsm8k.jsonl").read_bytes()
    with pytest.raises(S2FTError, match=f"{next(iter(change))}="):
        evaluate(options(base, data, tmp_path, "gsm8k", **change))
    assert (tmp_path / "base" / "gsm8k.jsonl").read_bytes() == before


def test_another_model_in_the_same_place_is_another_run(base, data, tmp_path, monkeypatch) -> None:
    says(monkeypatch, "0")
    mine = save_tiny_base(tmp_path / "mine")
    evaluate(options(str(mine), data, tmp_path / "out", "gsm8k"))
    moved = mine.rename(tmp_path / "moved")
    evaluate(options(str(moved), data, tmp_path / "out", "gsm8k"))  # the same model
    model = load_model(str(moved), torch.float32)
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(moved)
    with pytest.raises(S2FTError, match="model='sha256:"):
        evaluate(options(str(moved), data, tmp_path / "out", "gsm8k"))


@pytest.mark.usefixtures("short")
def test_each_adapter_is_evaluated_by_itself(base, data, tmp_path) -> None:
    folders = adapters(base, tmp_path)
    report = evaluate(options(base, data, tmp_path / "out", "gsm8k", adapter=folders))
    assert [row["model"] for row in report.rows] == ["ours", "lora"]
    evaluate(options(base, data, tmp_path / "out", "gsm8k"))
    texts = {}
    for name in ("ours", "lora", "base"):
        rows = [json.loads(line) for line in (tmp_path / "out" / name / "gsm8k.jsonl").read_text().splitlines()][1:]
        texts[name] = [row["output"] for row in sorted(rows, key=lambda row: int(row["id"]))]
    assert texts["ours"] != texts["lora"]
    alone = PeftModel.from_pretrained(load_model(base, torch.float32), folders[1])
    scored = score(alone, load_tokenizer(base), check_scores(["gsm8k"], data), tmp_path / "alone", batch_size=2)
    assert scored["gsm8k"]["asked"] == 7
    for name, model in (("lora", alone), ("base", load_model(base, torch.float32))):
        tokenizer = load_tokenizer(base)
        prompts = [tokenizer(question.prompt)["input_ids"] for question in work.load_questions(TASKS["gsm8k"], data)]
        found = {index: one.text for batch in TransformersEngine(model, tokenizer, 2).answers(prompts, Decoding(1, 4))
                 for index, one in batch}  # fmt: skip
        assert texts[name] == [found[index] for index in range(7)]


def test_the_base_is_lent_and_comes_back_as_it_was(base, tmp_path) -> None:
    models = Models(base, torch.float32, "transformers", 2)
    before = {name: tensor.clone() for name, tensor in models.base.state_dict().items()}
    for name, config in {"head": S2FTConfig, "lora head": partial(LoraConfig, target_modules=["q_proj"])}.items():
        kept = get_peft_model(load_model(base, torch.float32), config(modules_to_save=["lm_head"]))
        with torch.no_grad():
            kept.get_base_model().lm_head.modules_to_save["default"].weight.add_(1)
        kept.save_pretrained(tmp_path / name)
    folders = [*adapters(base, tmp_path), *(str(tmp_path / name) for name in ("head", "lora head"))]
    for subject in work.find_subjects(folders):
        with models.loaded(subject) as model:
            assert isinstance(model, PeftModel)
    after = models.base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}])
def test_what_an_adapter_writes_into_the_base_is_not_left_to_the_next(settings, tmp_path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=258, attention_bias=True, **sizes)).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    model = get_peft_model(
        load_model(base, torch.float32), LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **settings)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1, alpha=1.0 if parameter.requires_grad else 0.0)
    model.save_pretrained(tmp_path / "adapter")
    models = Models(base, torch.float32, "transformers", 2)
    before = {name: tensor.clone() for name, tensor in models.base.state_dict().items()}
    (subject,) = work.find_subjects([str(tmp_path / "adapter")])
    with models.loaded(subject):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in models.base.state_dict().items())


def test_an_adapter_whose_tensors_go_by_other_names_is_not_taken_for_the_base(base, tmp_path) -> None:
    folder = adapters(base, tmp_path)[1]
    path = Path(folder, "adapter_model.safetensors")
    save_file({name.replace("layers", "language_model.layers"): one for name, one in load_file(path).items()}, path)
    with (
        quiet(),
        pytest.raises(S2FTError, match="lora' has no values for some of its layers in this base: Found missing"),
    ):
        load_adapter(load_model(base, torch.float32), folder)


def test_tokens_before_the_prompt_are_refused(base, tmp_path) -> None:
    model = get_peft_model(
        load_model(base, torch.float32), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    model.save_pretrained(tmp_path / "prompt")
    with pytest.raises(S2FTError, match="prompt' puts tokens before the prompt"):
        load_adapter(load_model(base, torch.float32), str(tmp_path / "prompt"))


def test_an_adapter_in_a_pickle_is_not_opened(base, tmp_path) -> None:
    folder = Path(adapters(base, tmp_path)[1])
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(S2FTError, match=r"lora' holds a pickle, adapter_model\.bin, which is not opened"):
        work.find_subjects([str(folder)])


def test_with_vllm_the_bases_answers_end_where_those_of_its_adapters_do(base, data, tmp_path, monkeypatch) -> None:
    seen = []

    class Engine:
        def __init__(self, source, dtype, ends) -> None:
            seen.append(ends)
            self.answers = TransformersEngine(load_model(base, torch.float32), load_tokenizer(base), 2).answers

    monkeypatch.setattr("s2ft.evaluate.subjects.VllmEngine", Engine)
    named = Path(shutil.copytree(base, tmp_path / "base"))
    GenerationConfig(eos_token_id=[1, 7]).save_pretrained(named)
    models = Models(str(named), torch.float32, "vllm", 2)
    for subject in (*work.find_subjects([]), *work.find_subjects(adapters(str(named), tmp_path))):
        with models.engine(subject):
            pass
    assert seen == [[1, 7]] * 3


def test_vllm_gets_a_merged_copy(base, data, tmp_path, monkeypatch) -> None:
    folder, seen = adapters(base, tmp_path)[0], {}

    class Engine:
        def __init__(self, source, dtype, ends) -> None:
            model = load_model(source, torch.float32)
            seen.update(source=source, dtype=dtype, ends=ends, model=model)
            self.answers = TransformersEngine(model, load_tokenizer(source), 2).answers

    monkeypatch.setattr("s2ft.evaluate.subjects.VllmEngine", Engine)
    monkeypatch.setattr(work, "check_vllm", lambda: None)
    evaluate(options(base, data, tmp_path / "out", "gsm8k", adapter=[folder], engine="vllm"))
    expected = PeftModel.from_pretrained(load_model(base, torch.float32), folder).merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in seen["model"].state_dict().items())
    assert (seen["dtype"], seen["ends"]) == ("float32", [1])
    assert not Path(seen["source"]).exists()


@pytest.mark.usefixtures("short")
class TestScores:
    def test_base_against_tuned(self, base, data, tmp_path) -> None:
        model = PeftModel.from_pretrained(load_model(base, torch.float32), adapters(base, tmp_path)[0])
        model.train()
        checked = check_scores(["gsm8k", "boolq"], data, limit=4)
        told: list[int] = []
        found = Scorer(load_tokenizer(base), checked, tmp_path / "scores", 2, told.append).compare(model)
        assert (list(found), sum(told), model.training) == (["boolq", "gsm8k"], 16, True)
        assert found["gsm8k"]["questions"] == 4
        plain = score(load_model(base, torch.float32), load_tokenizer(base), checked, tmp_path / "plain", 2)
        assert section(plain, plain)["boolq"]["base"] == found["boolq"]["base"]
        kept = {
            name: (tmp_path / name / "gsm8k.jsonl").read_bytes() for name in ("scores/base", "scores/tuned", "plain")
        }
        assert kept["scores/base"] == kept["plain"]
        assert kept["scores/tuned"] != kept["plain"]
        row = f"| gsm8k | {found['gsm8k']['base']:.6g} | {found['gsm8k']['tuned']:.6g} |"
        assert row in to_markdown({"status": "finished", "scores": found})

    @pytest.mark.parametrize("method", ["s2ft", "full"])
    def test_a_run_card_holds_them(self, base, data, tmp_path, short, method) -> None:
        (tmp_path / "sums.json").write_text(json.dumps([{"prompt": f"{n}+1=", "completion": "so"} for n in range(8)]))
        chosen = {"ratios": 0.25} if method == "s2ft" else {}
        options = {"model": base, "data": str(tmp_path / "sums.json"), "output": str(tmp_path / "out"), "max_steps": 2}
        options |= {"method": method, "precision": "fp32", "gradient_accumulation": 1, "eval_limit": 3, **chosen}
        card = train(parse_options({**options, "evaluate": "gsm8k", "eval_data": data})).card
        assert card["scores"]["gsm8k"]["questions"] == 3
        assert json.loads((tmp_path / "out" / "run.json").read_text())["scores"] == card["scores"]
        row = f"| gsm8k | {card['scores']['gsm8k']['base']:.6g} | {card['scores']['gsm8k']['tuned']:.6g} |"
        assert row in (tmp_path / "out" / "run.md").read_text()
        (question, *_), page = (
            load_questions(TASKS["gsm8k"], data),
            (tmp_path / "out" / "report.html").read_bytes().decode(),
        )
        assert card["answers"][0]["right"] == question.gold
        assert len(card["answers"]) == 3
        for name in ("base", "tuned"):
            rows = read_answers(tmp_path / "out" / "answers" / name / "gsm8k.jsonl")
            assert card["answers"][0][name] == rows["0"]["output"]
        assert f"gsm8k: {escape(question.prompt)}" in page
        assert escape(card["answers"][0]["tuned"]) in page
        checked = check_scores(["gsm8k"], data, limit=3)
        plain = score(load_model(base, torch.float32), load_tokenizer(base), checked, tmp_path / "plain", 2)
        assert card["scores"]["gsm8k"]["base"] == plain["gsm8k"]["accuracy"]

    def test_answers_that_only_one_of_the_two_got_right_come_first(self, data, tmp_path) -> None:
        checked = check_scores(["gsm8k"], data, limit=4)
        for name, right in (("base", "0123"), ("tuned", "013")):
            rows = [{"id": i, "output": f"\u2028{name} {i}", "error": None, "correct": i in right} for i in "0123"]
            Answers(tmp_path / name / "gsm8k.jsonl", {}).add(rows)
        shown = Scorer(None, checked, tmp_path).answers(most=2)
        assert [(one["base"], one["base_correct"], one["tuned_correct"]) for one in shown] == [
            ("\u2028base 2", True, False),
            ("\u2028base 0", True, True),
        ]

    def test_questions_without_data_are_refused_before_anything_is_written(self, base, data, tmp_path) -> None:
        options = {"model": base, "data": "d", "output": str(tmp_path / "out")}
        with pytest.raises(S2FTError, match=r"evaluate=\['gsm8k'\] needs eval_data"):
            parse_options({**options, "evaluate": "gsm8k"})
        with pytest.raises(S2FTError, match="eval_limit=3 is of no use without evaluate"):
            parse_options({**options, "eval_limit": 3})

    def test_shares_are_those_of_the_answers(self, base, data, tmp_path, monkeypatch) -> None:
        checked = check_scores(["gsm8k"], data, limit=4)
        model, tokenizer = load_model(base, torch.float32), load_tokenizer(base)
        says(monkeypatch, "0", "2", "5", None)
        before = score(model, tokenizer, checked, tmp_path)
        says(monkeypatch, "0", "2", "4", "7")
        found = section(before, score(model, tokenizer, checked, tmp_path))["gsm8k"]
        assert (found["base"], found["tuned"], found["errors"]) == (2 / 3, 3 / 4, 1)
        assert found["tuned_interval"] == list(wilson(3, 4))

    def test_what_cannot_be_scored_is_said_before_training(self, data) -> None:
        with pytest.raises(S2FTError, match="evaluate='mt-bench' needs a judge"):
            check_scores(["instruction", "gsm8k"], data)
        with pytest.raises(S2FTError, match=r"has nothing on svamp: there is no dataset/SVAMP/test\.json"):
            check_scores(["svamp"], data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> dict[str, str]:
    """A base with a chat template, and adapters that were trained on it; those of chat and Alpaca were scored too."""
    folder = tmp_path_factory.mktemp("words")
    found = {"base": str(save_tiny_base(folder / "base", CHAT_TEMPLATE))}
    chat = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}
    records = (chat, {"instruction": "Add 1 and 1.", "output": "2"}, {"prompt": "1+1=", "completion": "2"})
    for words, record in zip(TRAINED, records, strict=True):
        (folder / "data.json").write_text(json.dumps([record] * 4))
        run = {
            "model": found["base"],
            "data": str(folder / "data.json"),
            "output": str(folder / words),
            "ratios": 0.25,
        }
        run |= {"max_steps": 2, "save_every": 1, "precision": "fp32", "gradient_accumulation": 1, "batch_size": 2}
        train(parse_options({**run, "evaluate": "boolq", "eval_data": data, "eval_limit": 1}))
        found[words] = str(folder / words)
    return found


class TestWords:
    """An adapter is asked in the words that it was trained on."""

    def asked(self, trained, data, output, monkeypatch, adapter, **more) -> str:
        prompts = says(monkeypatch, "0")
        report = evaluate(options(trained["base"], data, output, "gsm8k", limit=1, adapter=adapter, **more))
        text = load_tokenizer(trained["base"]).decode(prompts[0])
        words = "chat" if text == "<user>Add 0 and 0.<assistant>" else "alpaca"
        assert words == "chat" or text == alpaca_prompt("Add 0 and 0.")
        assert list(report.settings["words"].values()) == [words]
        return words

    @pytest.mark.parametrize("part", ["", "checkpoint-1"])
    @pytest.mark.parametrize("name", TRAINED)
    def test_by_default(self, trained, data, tmp_path, monkeypatch, name, part) -> None:
        found = self.asked(trained, data, tmp_path / "out", monkeypatch, [str(Path(trained[name], part))])
        assert found == {"text": "alpaca"}.get(name, name)

    def test_of_a_model_that_training_left_too(self, trained, data, tmp_path, monkeypatch) -> None:
        run = json.loads((Path(trained["chat"]) / "run.json").read_text())
        model = shutil.copytree(trained["base"], tmp_path / "model")
        (model / "run.json").write_text(json.dumps({"data": run["data"]}))
        assert self.asked({"base": str(model)}, data, tmp_path / "out", monkeypatch, []) == "chat"

    def test_of_one_on_the_hub_too(self, tmp_path, monkeypatch, caplog) -> None:
        (tmp_path / "run.json").write_text(json.dumps({"data": {"format": "chat"}}))
        monkeypatch.setattr("s2ft.evaluate.subjects.hf_hub_download", lambda name, file: str(tmp_path / file))
        (subject,) = find_subjects([])
        assert work.choose_words(options("me/chat", "data", tmp_path), subject) == "chat"
        assert work.choose_words(options("me/chat", "data", tmp_path, prompt="alpaca"), subject) == "alpaca"
        assert "base was trained on chat, but is asked in the words of alpaca" in caplog.text

    def test_unless_told_otherwise_with_a_warning(self, trained, data, tmp_path, monkeypatch, caplog) -> None:
        assert self.asked(trained, data, tmp_path, monkeypatch, [trained["chat"]], prompt="alpaca") == "alpaca"
        assert "chat was trained on chat, but is asked in the words of alpaca" in caplog.text
        assert self.asked(trained, data, tmp_path / "base", monkeypatch, []) == "alpaca"

    def test_in_the_run_card_too(self, trained, data) -> None:
        for name in ("chat", "alpaca"):
            checked = check_scores(["boolq"], data, 1, name)
            row = json.loads((Path(trained[name]) / "answers" / "tuned" / "boolq.jsonl").read_text().splitlines()[1])
            assert row["prompt"] == digest(checked.questions[0][1][0].prompt)


class TestCommand:
    def run(self, *words: str):
        return CliRunner().invoke(app, ["eval", *words])

    def test_it_prints_and_writes(self, base, data, tmp_path, monkeypatch) -> None:
        monkeypatch.setenv("COLUMNS", "60")  # narrower than the table, which is whole all the same
        rows = tmp_path / "rows.json"
        words = [
            "--model",
            base,
            "--task",
            "gsm8k",
            "--task",
            "aqua",
            "--data",
            data,
            "--output",
            str(tmp_path / "out"),
            *QUICK,
        ]
        result = self.run(*words, "--limit", "2", "--json", str(rows))
        assert result.exit_code == 0, result.output
        assert "aqua (strict)" in result.output
        assert "2 of 7" in result.output
        report = json.loads(rows.read_text())
        assert [row["task"] for row in report["rows"]] == ["gsm8k", "aqua", "aqua (strict)"]
        assert report["settings"]["tasks"]["gsm8k"] == {"beams": 1, "max_new_tokens": 4}
        assert report["environment"]["torch"] == torch.__version__

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--task", "gsm9k"], "task='gsm9k' is unknown; did you mean gsm8k"),
            ([], "task: name at least one task or suite"),
            (["--task", "svamp", "--limit", "0", "--batch-size", "-1"], "3 problems"),
            (["--task", "gsm8k", "--prompt", "vicuna"], "prompt='vicuna' is unknown; choose from auto, alpaca, chat"),
            (["--task", "gsm8k", "--engine", "tgi"], "engine='tgi' is unknown"),
            (["--task", "gsm8k", "--adapter", "."], "adapter='.' is a folder without adapter_config.json"),
            (["--task", "gsm8k", "--adapter", "./no"], "adapter='./no' is not a folder"),
            (["--suite", "commonsense"], "has nothing on piqa"),
            (["--task", "gsm9k", "--adapter", "./no", "--model", "./none", "--beams", "0"], "4 problems"),
            (["--harness", "helm"], "leave out --suite and --output"),
            (["--task", "mt-bench", "--judge-url", "http://h/v1"], "judge_url='http://h/v1' alone is not enough"),
        ],
    )
    def test_bad_input_is_said_before_anything_is_written(
        self, base, data, tmp_path, monkeypatch, words, message
    ) -> None:
        monkeypatch.delenv("S2FT_JUDGE_MODEL", raising=False)
        output = tmp_path / "out"
        result = self.run("--model", base, "--data", data, "--output", str(output), *words)
        assert isinstance(result.exception, S2FTError)
        assert message in str(result.exception)
        assert not output.exists()

    def test_a_model_without_a_tokenizer_is_refused(self, base, data, tmp_path) -> None:
        bare = tmp_path / "bare"
        load_model(base, torch.float32).save_pretrained(bare)
        result = self.run("--model", str(bare), "--data", data, "--output", str(tmp_path / "out"), "--task", "gsm8k")
        assert "its tokenizer cannot be loaded" in str(result.exception)

    def test_adapters_of_one_name_are_refused(self, base, data, tmp_path) -> None:
        folders = [adapters(base, tmp_path / name)[0] for name in ("one", "two")]
        with pytest.raises(S2FTError, match="two go by 'ours'"):
            evaluate(options(base, data, tmp_path / "out", "gsm8k", adapter=folders))
