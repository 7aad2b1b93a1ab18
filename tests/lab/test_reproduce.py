"""Recipes: what they say, what they need, and every one of them run from data to result, on a small model and little data."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from fake_judge import FakeJudge
from launching import LAUNCH, ON_CPU
from s2ft import S2FTError
from s2ft.cli.app import app
from s2ft.evaluate.run import EvalReport
from s2ft.evaluate.tally import wilson
from s2ft.evaluate.tasks import TASKS
from s2ft.finetune.options import parse_options
from s2ft.lab.reproduce import memory, run
from s2ft.lab.reproduce.options import ReproduceOptions
from s2ft.lab.reproduce.recipes import GLOBAL_BATCH, MODELS, find_recipe, recipes
from s2ft.lab.reproduce.run import reproduce, train_options
from s2ft.lab.reproduce.table import hours, recipe_line, recipe_rows
from s2ft.runtime.processes import process_count
from tiny_base import byte_tokenizer

GOLD = {"boolq": "true", "piqa": "solution1", "hellaswag": "ending1", "winogrande": "option1", "aqua": "C"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A Llama with heads enough for a twentieth of them to be one."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 16}
    more = {"vocab_size": 258, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": True}
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**shape, **more, max_position_embeddings=512)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Laid out like LLM-Adapters and MT-Bench, with two questions for each task."""
    folder = tmp_path_factory.mktemp("data")
    examples = [
        {"instruction": f"Say {n}.", "output": f"the correct answer is {n}", "answer": str(n)} for n in range(20)
    ]
    for name in ("ft-training_set/commonsense_170k.json", "ft-training_set/math_10k.json", "alpaca.json"):
        write(folder / name, examples)
    for task in TASKS.values():
        numbered = "answer1" if task.suite == "commonsense" else "7"
        asked = [{"instruction": f"Question {n}?", "answer": GOLD.get(task.name, numbered)} for n in range(2)]
        if task.rule is not None:
            write(folder / "dataset" / task.folder / "test.json", asked)
    dialogue = {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Shorten it."]}
    (folder / "question.jsonl").write_text(json.dumps(dialogue) + "\n")
    return folder


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    fake = FakeJudge()
    yield fake.judge()
    fake.server.shutdown()
    fake.server.server_close()


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def small(recipe: str, data: Path, output: Path, base: str, **more) -> ReproduceOptions:
    """Small in model and data; no step is left out."""
    suite = find_recipe(recipe).suite
    training = str(data / "alpaca.json") if suite == "instruction" else None
    less = {"limit": 20, "max_steps": 2, "eval_limit": 1, "max_new_tokens": 2, **more}
    values = {"recipe": recipe, "data": str(data), "output": output, "training_data": training, "model": base, **less}
    return ReproduceOptions.parse(values)


# What the recipes say


def test_every_row_of_the_tables_is_there():
    trained = {"s2ft", "full", "lora", "dora"}
    wanted = {
        f"{s}/{m}/{x}" for s in ("commonsense", "arithmetic") for m in ("llama2-7b", "llama3-8b") for x in trained
    }
    rivals = {"vanilla", "full", "lora", "galore", "lisa", "s2ft"}
    wanted |= {f"instruction/{m}/{x}" for m in ("llama2-7b", "mistral-7b") for x in rivals}
    assert set(recipes()) == wanted


@pytest.mark.parametrize("name", [name for name, recipe in recipes().items() if recipe.is_trained])
def test_a_recipe_has_the_papers_settings(name, data, tmp_path):
    recipe = find_recipe(name)
    options = train_options(recipe, ReproduceOptions(recipe=name, data=str(data), output=tmp_path))
    assert options.batch_size * options.gradient_accumulation == GLOBAL_BATCH == 64
    assert (options.clip, options.weight_decay, options.train_seed, options.max_length) == (1.0, 0.0, 0, None)
    assert options.epochs == (1 if recipe.suite == "instruction" else 3)
    assert options.schedule == ("cosine" if recipe.suite == "instruction" else "linear")
    assert options.holdout == (120 if recipe.suite == "commonsense" else None)
    rates = {"commonsense": 2e-4, "arithmetic": 1e-3, "instruction": 2e-5}
    if recipe.method == "s2ft":
        assert options.learning_rate == rates[recipe.suite]
        grouped = recipe.model != "llama2-7b"
        assert options.ratios == ({"down_proj": 0.03} if grouped else {"o_proj": 0.052, "down_proj": 0.02})
    assert options.learning_rate is not None  # whatever a run without a recipe takes
    assert options.model == MODELS[recipe.model].hub


def test_several_processes_share_the_global_batch(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert process_count() == 1  # a scheduler's; no launcher has set LOCAL_RANK
    monkeypatch.setenv("LOCAL_RANK", "0")
    recipe = find_recipe("arithmetic/llama2-7b/s2ft")
    options = train_options(recipe, ReproduceOptions(recipe=recipe.name, data=str(data), output=tmp_path, batch_size=2))
    assert options.gradient_accumulation == 4
    with pytest.raises(S2FTError, match="batch_size=16 times 8 processes does not divide the 64"):
        train_options(recipe, ReproduceOptions(recipe=recipe.name, data=str(data), output=tmp_path, batch_size=16))


def test_the_page_lists_every_recipe_with_the_papers_figure():
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    assert all(f"| `{name}` | {recipe.paper:g} |" in page for name, recipe in recipes().items())


@pytest.mark.slow
def test_the_page_has_the_table_that_the_command_shows():
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    for row in recipe_rows():
        name, *needs = recipe_line(row).values()
        assert f"| `{name}` | {' | '.join(needs)} |" in page


# Every recipe, run


def _quick_or_slow(name: str):
    """Every method and suite is run each time; on the other base models, which differ in options alone, by `make test-slow`."""
    return name if find_recipe(name).model == "llama2-7b" else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", map(_quick_or_slow, recipes()))
def test_a_recipe_runs_from_data_to_result(name, data, base, judge, tmp_path):
    options = small(name, data, tmp_path / "out", base)
    found = reproduce(options, judge=judge)
    assert found is not None
    result = json.loads((tmp_path / "out" / "reproduction.json").read_text())
    recipe = find_recipe(name)
    assert result["result"] == found.result
    assert result["result"]["paper"] == recipe.paper
    assert result["result"]["difference"] == pytest.approx(result["result"]["score"] - recipe.paper)
    of_training = {"limit", "max_steps", "examples"} if recipe.is_trained else set()
    assert result["result"]["deviations"].keys() >= {"model", "eval_limit", "max_new_tokens"} | of_training
    assert recipe.is_trained or not {"limit", "training_data"} & result["result"]["deviations"].keys()
    if recipe.suite == "instruction":
        assert result["result"]["score"] == 7  # what the judge says
    else:
        tasks = {task.name for task in TASKS.values() if task.suite == recipe.suite}
        assert {row["task"] for row in result["rows"]} >= tasks
    if recipe.is_trained:
        card = json.loads((tmp_path / "out" / "training" / "run.json").read_text())
        assert card["training"]["steps"] == 2
        assert card["options"]["method"] == recipe.method
        assert ("best_step" in card["training"]) == (recipe.suite == "commonsense")


def test_a_run_that_died_in_its_first_checkpoint_begins_anew(data, base, tmp_path, monkeypatch):
    """transformers would take the folder for a checkpoint."""
    (tmp_path / "training" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "training" / "checkpoint-1" / "unfinished").touch()
    asked = []
    monkeypatch.setattr(run, "train", lambda options: asked.append(options.resume) or SimpleNamespace(interrupted=True))
    assert reproduce(small("arithmetic/llama3-8b/lora", data, tmp_path, base)) is None
    assert asked == [False]


def test_what_is_done_is_not_done_again(data, base, tmp_path, monkeypatch):
    options = small("arithmetic/llama3-8b/lora", data, tmp_path, base)
    first = reproduce(options)
    monkeypatch.setattr(run, "train", None)
    again = reproduce(options)
    assert first is not None
    assert again is not None
    assert again.result == first.result
    with pytest.raises(S2FTError, match=r"max_steps=1, but .*training was trained with max_steps=2"):
        reproduce(small("arithmetic/llama3-8b/lora", data, tmp_path, base, max_steps=1))
    other = tmp_path / "other.json"
    write(other, [{"instruction": f"Count {n}.", "output": str(n)} for n in range(20)])
    with pytest.raises(S2FTError, match=r"other\.json'\] is not what .*training was trained on"):
        reproduce(options.model_copy(update={"training_data": str(other)}))


def test_the_score_is_the_mean_of_the_tasks(data, base, tmp_path):
    found = reproduce(small("arithmetic/llama2-7b/full", data, tmp_path, base))
    assert found is not None
    rows = [row for row in found.report.rows if row["task"] in TASKS]
    assert len(rows) == 7
    assert found.result["score"] == pytest.approx(100 * sum(row["accuracy"] for row in rows) / 7)
    assert 0 <= found.result["low"] <= found.result["score"] < found.result["high"] <= 100


def test_the_interval_of_a_mean_holds_it_95_times_in_100():
    rng, shares, held = random.Random(1), (0.02, 0.3, 0.5, 0.97), 0
    for _ in range(1000):
        rows = []
        for share in shares:
            right = sum(rng.random() < share for _ in range(40))
            low, high = wilson(right, 40)
            rows.append({"task": "a", "accuracy": right / 40, "low": low, "high": high})
        _, low, high = run._accuracy(EvalReport({}, rows))
        held += low <= 100 * sum(shares) / len(shares) <= high
    assert 920 < held < 985


# Bad input


def test_unknown_recipe_and_missing_files_are_refused_before_anything_is_written(data, base, tmp_path):
    with pytest.raises(
        S2FTError, match="recipe='arithmetic/llama2/s2ft' is unknown; did you mean arithmetic/llama2-7b/s2ft"
    ):
        find_recipe("arithmetic/llama2/s2ft")
    output = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    with pytest.raises(S2FTError, match=r"has no ft-training_set/math_10k\.json"):
        reproduce(small("arithmetic/llama2-7b/s2ft", tmp_path / "empty", output, base))
    write(tmp_path / "half" / "ft-training_set" / "math_10k.json", [{"instruction": "a", "output": "b"}])
    with pytest.raises(S2FTError, match="has nothing on multiarith"):
        reproduce(small("arithmetic/llama2-7b/s2ft", tmp_path / "half", output, base))
    assert not output.exists()


def test_numbers_are_refused_by_their_own_names(data, base, tmp_path):
    with pytest.raises(S2FTError, match="eval_limit=0 must be 1 or more"):
        reproduce(small("arithmetic/llama2-7b/s2ft", data, tmp_path / "out", base, eval_limit=0))
    assert not (tmp_path / "out").exists()


def test_everything_that_is_wrong_is_said_before_training(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("it trains"))
    (tmp_path / "empty").mkdir()
    options = small("arithmetic/llama2-7b/s2ft", tmp_path / "empty", tmp_path / "out", base, engine="vllm")
    with pytest.raises(S2FTError) as caught:
        reproduce(options)
    for part in ("has nothing on multiarith", "has no ft-training_set/math_10k.json", "engine='vllm' needs vLLM"):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command_names_all_that_is_missing():
    result = CliRunner().invoke(app, ["reproduce"])
    assert isinstance(result.exception, S2FTError)
    assert all(name in str(result.exception) for name in ("RECIPE", "--data", "--output"))


def test_the_command_prints_both_figures(data, base, tmp_path):
    words = ["reproduce", "arithmetic/llama2-7b/s2ft", "--data", str(data), "--output", str(tmp_path / "out")]
    words += ["--model", base, "--limit", "20", "--max-steps", "1", "--eval-limit", "1", "--max-new-tokens", "1"]
    result = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "a.json")])
    assert result.exit_code == 0, result.output
    assert "72" in result.output
    assert "not the paper's run" in result.output
    assert json.loads((tmp_path / "a.json").read_text())["paper"] == 72.0


# What a recipe needs


SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "vocab_size": 8,
}


@pytest.mark.parametrize("method", ["s2ft", "lora", "dora", "full"])
def test_activations_are_what_the_whole_model_keeps(method):
    """Predicted from narrow and shallow models; measured on the model itself."""
    recipe = find_recipe(f"arithmetic/llama2-7b/{method}")
    options = parse_options({**recipe.options, "model": "m", "data": "d", "output": "o"})
    fixed, a_token = memory._activations(SHAPE, options)
    predicted = fixed + 96 * a_token
    measured = memory._kept(SHAPE, options, tokens=96)
    assert predicted == pytest.approx(measured, rel=0.04)


@pytest.mark.slow
def test_bytes_of_full_tuning_are_sixteen_a_parameter():
    found = memory.training_memory(find_recipe("arithmetic/llama2-7b/full"))
    assert found.weights + found.trained == 16 * memory.parameters(MODELS["llama2-7b"].shape)
    less = memory.training_memory(find_recipe("arithmetic/llama2-7b/s2ft"))
    assert less.total(2048) < found.total(2048) / 4
    assert less.total(4096) - less.total(2048) == pytest.approx(2048 * less.a_token)


def test_trained_bytes_of_an_adapter_are_sixteen_a_parameter():
    """LoRA of rank 32 on q, k, v, up, down of LLaMA2-7B."""
    width, inner, blocks = 4096, 11008, 32
    count = blocks * 32 * (3 * (width + width) + 2 * (width + inner))
    recipe = find_recipe("commonsense/llama2-7b/lora")
    options = parse_options({**recipe.options, "model": "m", "data": "d", "output": "o"})
    with torch.device("meta"):
        model = memory._adapted(MODELS[recipe.model].shape, options)[1]
    assert memory._trained_bytes(model, options) == 16 * count


def test_hours_follow_from_tokens_and_steps():
    recipe = find_recipe("arithmetic/llama2-7b/full")
    tokens, steps = 3 * 9919 * 160, 3 * 9919 / 64
    assert hours(recipe, 6.74e9) == pytest.approx((tokens / 512 * 125 + steps * 189) / 3.6e6)
    assert hours(recipe, 2 * 6.74e9) == pytest.approx(2 * hours(recipe, 6.74e9))
    assert hours(find_recipe("instruction/llama2-7b/vanilla"), 6.74e9) == 0


@pytest.mark.slow
def test_two_processes_train_and_one_evaluates(data, base, tmp_path):
    words = ["arithmetic/llama2-7b/s2ft", "--data", str(data), "--output", str(tmp_path / "out"), "--model", base]
    words += ["--limit", "20", "--max-steps", "2", "--eval-limit", "1", "--max-new-tokens", "1"]
    command = [*LAUNCH, "-m", "s2ft.cli.app", "reproduce", *words]
    done = subprocess.run(command, env={**os.environ, **ON_CPU}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("not the paper's run") == 1
    result = json.loads((tmp_path / "out" / "reproduction.json").read_text())
    assert result["settings"]["train"]["gradient_accumulation"] == GLOBAL_BATCH // 4 // 2
    assert len({row["task"] for row in result["rows"]} & set(TASKS)) == 7
