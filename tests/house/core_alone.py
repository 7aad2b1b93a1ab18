"""`pip install s2ft` without any extra, used as a person would. `make test-wheel` runs this where nothing else is installed."""

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import s2ft
from s2ft import S2FTConfig
from s2ft.demo import base_path
from s2ft.runtime.environment import environment

EXTRAS = ("trl", "datasets", "matplotlib", "pandas", "pyarrow", "gguf", "lm_eval")
COMMANDS = {  # what they say here; no key: they run
    "train --model {base} --data {folder}/data.json --output {folder}/new": "s2ft train needs {}: pip install 's2ft[train]'",
    "quickstart": "s2ft quickstart needs {}: pip install 's2ft[train]'",
    "eval --model {base} --task boolq --data org/set --output {folder}/new": "s2ft eval needs {}: pip install 's2ft[eval]'",
    "serve {base}": "s2ft serve needs {}: pip install 's2ft[serve]'",
    "reproduce --list": "s2ft reproduce needs {}: pip install 's2ft[lab]'",
    "bench selection": "s2ft bench needs {}: pip install 's2ft[lab]'",
    "study fusion": "s2ft study needs {}: pip install 's2ft[lab]'",
    "inspect {folder}/one --png {folder}/a.png": "--png='{folder}/a.png' needs {}: pip install 's2ft[lab]'",
    "export {folder}/one --to gguf --output {folder}/a.gguf": "a GGUF adapter needs the package gguf: pip install 's2ft[gguf]'",
    "env": "",
    "inspect {folder}/one": "",
    "fuse {folder}/one {folder}/two --output {folder}/both": "",
    "export {folder}/one --to lora --output {folder}/lora --base {base}": "",
    "merge {folder}/one --output {folder}/merged --base {base}": "",
}


def base_model() -> torch.nn.Module:
    """The embedded model."""
    return AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32)


def make_adapters(folder: Path) -> None:
    """Two adapters, trained for one step."""
    for seed, name in enumerate(("one", "two")):
        model = get_peft_model(base_model(), S2FTConfig(ratios=0.2, seed=seed))
        ids = torch.arange(32).reshape(1, -1)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 1.0).step()
        model.save_pretrained(folder / name)


def use_adapters(folder: Path) -> None:
    """Load, generate, switch and merge."""
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    inputs = tokenizer("reverse: abc =", return_tensors="pt")
    model = PeftModel.from_pretrained(base_model(), folder / "one").eval()
    model.load_adapter(folder / "two", "two")
    model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        s2ft.switch(model, "two")
        switched = model(**inputs).logits
        assert not torch.equal(switched, base_model()(**inputs).logits)
        s2ft.switch(model, None)
        model.set_adapter("two")
        torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, switched)


def run(words: str, said: str, folder: Path) -> None:
    """A command: it says what it needs and nothing else, or it runs."""
    typed = words.format(base=base_path(), folder=folder).split()
    command = [str(Path(sys.executable).parent / "s2ft"), *typed]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if not said:
        assert done.returncode == 0, done.stderr
        return
    start, found, end = said.replace("{folder}", str(folder)).partition("{}")
    assert (done.returncode, done.stdout) == (2, ""), (words, done)
    assert done.stderr.startswith(f"error: {start}"), (words, done.stderr)
    assert done.stderr.endswith(f"{end}\n"), (words, done.stderr)
    assert not found or ", which is not installed" in done.stderr, (words, done.stderr)
    print(f"s2ft {typed[0]}: {done.stderr.strip()}")


def main() -> None:
    """Everything, in a folder that goes away."""
    there = [name for name in EXTRAS if find_spec(name)]
    assert not there, f"installed, so that this says nothing: {there}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data.json").write_text('[{"prompt": "1+1=", "completion": "2"}]')
        make_adapters(folder)
        use_adapters(folder)
        for words, said in COMMANDS.items():
            run(words, said, folder)
    assert "trl" not in environment()  # what issues are asked to paste
    print(f"s2ft {s2ft.__version__}: the core works alone")


if __name__ == "__main__":
    main()
