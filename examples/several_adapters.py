"""Several adapters on one model: a row of the batch names its adapter, and a third one is the sum of two.

python examples/several_adapters.py
"""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2ft import S2FTConfig
from s2ft.demo import base_path

MODEL = str(base_path())  # your model; load your adapters by PeftModel.from_pretrained and load_adapter


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    # init_weights=False draws random deltas, so that these untrained adapters change something
    one = S2FTConfig(budget=0.01, seed=1, init_weights=False, task_type="CAUSAL_LM")
    two = S2FTConfig(budget=0.01, seed=2, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, one, adapter_name="one")
    model.add_adapter("two", two)
    model.base_model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both")
    model.eval()

    names = ["one", "two", "both", "__base__"]
    inputs = tokenizer(["reverse: planet\n"] * len(names), return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs, adapter_names=names).logits
    for name, row in zip(names, logits, strict=True):
        print(f"{name:8} is {float((row - logits[-1]).abs().max()):.3f} away from the base")


if __name__ == "__main__":
    main()
