"""Preferences with TRL: which of two answers is better. The reference is the base: the model with its adapter disabled.

python examples/dpo.py runs/dpo
"""

import sys

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from s2ft import S2FTConfig, in_place
from s2ft.demo import base_path
from s2ft.demo.skills import SKILLS

MODEL = str(base_path())  # your model
DATA = [  # your data: a prompt, the better answer and the worse one; here, shouting is preferred
    {"prompt": example["prompt"], "chosen": example["completion"].upper(), "rejected": example["completion"]}
    for example in SKILLS["reverse"].examples(64, seed=0)
]


def main(folder: str) -> None:
    trainer = DPOTrainer(
        MODEL,
        args=DPOConfig(
            folder,
            per_device_train_batch_size=8,
            num_train_epochs=4,
            learning_rate=2e-3,
            logging_steps=4,
            bf16=False,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(DATA),
        peft_config=S2FTConfig(budget=0.02, strategy="weight", task_type="CAUSAL_LM"),
    )
    with in_place(trainer.model):
        trainer.train()
    trainer.save_model(folder)
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    print(f"reward margin {margins[0]:+.3f} → {margins[-1]:+.3f}; the adapter is in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs/dpo"])
