"""PEFT's method comparison with S²FT: our wrapper around a stand-in for PEFT's script, and around PEFT's own if it is there.

S2FT_TEST_PEFT names a checkout of PEFT's repository; its script then runs on a tiny model, with made-up data, on the CPU.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import s2ft
from commands import Command
from s2ft.demo import base_path
from tiny_base import tiny_model

WRAPPER = Path(__file__).parents[2] / "examples" / "method_comparison" / "run.py"
EXPERIMENTS = sorted(WRAPPER.parent.glob("experiments/*/*"))
STEPS = 5000  # PEFT's
LLAMA = {
    "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip

STAND_IN = {
    "utils.py": """
from peft import get_peft_model
from tiny_base import tiny_model

def get_model(*, model_id, peft_config):
    return get_peft_model(tiny_model(), peft_config)
""",
    "run.py": """
import argparse, json, torch
from peft import PeftConfig
from utils import get_model

parser = argparse.ArgumentParser()
parser.add_argument("-v", "--verbose", action="store_true")
parser.add_argument("path_experiment")
given = parser.parse_args()
model = get_model(model_id="tiny", peft_config=PeftConfig.from_pretrained(given.path_experiment))
layouts = {layer.layout is not None for layer in model.modules() if hasattr(layer, "s2ft_block")}
ids = torch.arange(48).reshape(2, 24)
with model.disable_adapter(), torch.no_grad():
    base = model(input_ids=ids).logits
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for _ in range(3):
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    model.generate(input_ids=ids, max_new_tokens=2)
model.save_pretrained("saved")
with torch.no_grad():
    torch.save({"base": base, "tuned": model(input_ids=ids).logits}, "outputs.pt")
print(json.dumps({"layouts": list(layouts), "verbose": given.verbose}))
""",
}


def started(folder: Path, before: str = "") -> Command:
    """The wrapper in a process of its own, on the first experiment."""
    experiment = "/".join(EXPERIMENTS[0].parts[-2:])
    program = f"{before}\nimport runpy, sys\nsys.argv = ['run.py', {str(folder)!r}, {experiment!r}, '--verbose']\n"
    return Command(f"{program}runpy.run_path({str(WRAPPER)!r}, run_name='__main__')", folder / "log")


def test_the_script_trains_in_place_and_saves_what_loads_on_the_base(tmp_path: Path) -> None:
    for name, text in STAND_IN.items():
        (tmp_path / name).write_text(text)
    command = started(tmp_path)
    assert command.wait() == 0, command.printed
    assert json.loads(command.printed.splitlines()[-1]) == {"layouts": [True], "verbose": True}
    outputs, ids = torch.load(tmp_path / "outputs.pt", weights_only=True), torch.arange(48).reshape(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(outputs["base"], tiny_model()(ids).logits)
        tuned = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved").eval()(ids).logits
    torch.testing.assert_close(outputs["tuned"], tuned, rtol=1e-4, atol=1e-4)
    assert (outputs["tuned"] - outputs["base"]).abs().max() > 0.01


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda path: path.name)
def test_an_experiment_trains_what_its_name_and_the_page_say_at_the_rate_of_the_rule(folder: Path) -> None:
    config = PeftConfig.from_pretrained(str(folder))
    config.strategy, config.seed = "random", 0
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**LLAMA)), config)
    trained, everything = model.get_nb_trainable_parameters()
    page = (WRAPPER.parents[2] / "docs" / "method_comparison.md").read_text(encoding="utf-8")
    assert f"| `{folder.name}` | {trained:,} | {trained / (everything - trained):.2%} |" in page
    settings = json.loads((folder / "training_params.json").read_text())
    assert settings == {"optimizer_kwargs": {"lr": s2ft.learning_rate(model, STEPS), "weight_decay": 0.0}}


FAKES = """
import random, sys, types
import datasets, peft.utils, torch
from importlib.machinery import ModuleSpec

sys.modules["bitsandbytes"] = types.ModuleType("bitsandbytes")  # the script notes its version
sys.modules["bitsandbytes"].__version__ = "none"
sys.modules["bitsandbytes"].__path__ = ["site-packages"]
sys.modules["bitsandbytes"].__spec__ = ModuleSpec("bitsandbytes", None)
for name, value in {"memory_allocated": 1, "memory_reserved": 2, "max_memory_reserved": 3}.items():
    setattr(torch.cuda, name, lambda value=value: value)
for name in ("reset_peak_memory_stats", "empty_cache", "manual_seed_all"):
    setattr(torch.cuda, name, lambda *_: None)
torch.cuda.get_device_name = lambda *_: "none"
peft.utils.infer_device = lambda: "cuda"  # it refuses a CPU
sys.path.insert(0, FOLDER)
torch.nn.Linear.to = lambda self, *_: self  # it warms the GPU up with one
import utils

load = utils.AutoModelForCausalLM.from_pretrained
utils.AutoModelForCausalLM = types.SimpleNamespace(from_pretrained=lambda device_map, **more: load(device_map="cpu", **more))
utils.get_peft_branch = lambda: "dry-run"
utils.get_peft_worktree_is_dirty = lambda: False
utils.get_git_hash = lambda module: None

def load_dataset(name, *_, **options):
    sums = [(f"What is {n} + {n + 1}?", f"It is {2 * n + 1}. #### {2 * n + 1}") for n in range(24)]
    if "finewiki" in name:
        return types.SimpleNamespace(take=lambda count: [{"text": "sort: bhnj\\nbhjn"}] * 3)
    columns = ("query", "response") if "MetaMath" in name else ("question", "answer")
    rows = datasets.Dataset.from_dict(dict(zip(columns, map(list, zip(*sums)))))
    if "MetaMath" in name:
        rows = rows.add_column("type", ["sum"] * 24).add_column("original_question", ["?"] * 24)
    return datasets.DatasetDict({"train": rows, "test": rows.select(range(4))})

datasets.load_dataset = load_dataset
"""


@pytest.mark.slow
@pytest.mark.skipif("S2FT_TEST_PEFT" not in os.environ, reason="S2FT_TEST_PEFT names no checkout of PEFT")
def test_pefts_own_script_runs_on_a_tiny_model(tmp_path: Path) -> None:
    source = Path(os.environ["S2FT_TEST_PEFT"]) / "method_comparison" / "MetaMathQA"
    folder = tmp_path / "MetaMathQA"
    folder.mkdir()
    for name in ("run.py", "utils.py", "data.py", "default_training_params.json"):
        shutil.copy(source / name, folder / name)
    (folder / "temporary_results").mkdir()
    script = (folder / "run.py").read_text().replace("1 < wiki_loss_before < 2", "wiki_loss_before > 0")  # as of Llama
    (folder / "run.py").write_text(script)
    tiny = {"model_id": str(base_path()), "dtype": "float32", "max_steps": 4, "eval_steps": 2, "batch_size": 2}
    defaults = json.loads((folder / "default_training_params.json").read_text())
    defaults |= {**tiny, "max_seq_length": 64, "generation_kwargs": {"max_new_tokens": 4}}
    (folder / "default_training_params.json").write_text(json.dumps(defaults))
    command = started(folder, f"FOLDER = {str(folder)!r}\n{FAKES}")
    assert command.wait() == 0, command.printed
    (result,) = folder.glob("temporary_results/s2ft--*.json")
    told = json.loads(result.read_text())
    assert told["train_info"]["status"] == "success", told["run_info"]["error_msg"]
    assert told["run_info"]["peft_config"]["peft_type"] == "S2FT"
    assert [row["step"] for row in told["train_info"]["metrics"]] == [2, 4, 4]
    assert told["train_info"]["num_trainable_params"] < 0.05 * told["train_info"]["num_total_params"]
    assert told["train_info"]["file_size"] > 4 * told["train_info"]["num_trainable_params"]
