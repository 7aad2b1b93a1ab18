"""Switching: the adapter's slices are copied into the base weights, and back by copy.

python examples/switch.py
"""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2ft import S2FTConfig, switch
from s2ft.demo import base_path

MODEL = str(base_path())  # your model


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    random = S2FTConfig(budget=0.01, seed=1, init_weights=False, task_type="CAUSAL_LM")  # untrained, but not zero
    model = get_peft_model(base, random, adapter_name="mine").eval()

    inputs = tokenizer("reverse: planet\n", return_tensors="pt")
    logits = {}
    for name in ("mine", None):
        switch(model, name)
        with torch.no_grad():
            logits[name] = model(**inputs).logits
    print(f"the adapter moves the logits by up to {float((logits['mine'] - logits[None]).abs().max()):.3f}")

    restored = model.unload().state_dict()
    print("base weights as before:", all(torch.equal(before[name], restored[name]) for name in before))


if __name__ == "__main__":
    main()
