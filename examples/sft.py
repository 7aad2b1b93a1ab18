"""Supervised fine-tuning with TRL: `S2FTConfig` where a `LoraConfig` would stand, and one `with` for speed.

python examples/sft.py runs/sft
"""

import sys

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from s2ft import S2FTConfig, in_place, learning_rate
from s2ft.demo import base_path
from s2ft.demo.skills import SKILLS

MODEL = str(base_path())  # your model: a folder or a name on the Hub
DATA = SKILLS["river"].examples(200, seed=0)  # your data: prompts and completions


def main(folder: str) -> None:
    trainer = SFTTrainer(
        MODEL,
        args=SFTConfig(
            folder,
            per_device_train_batch_size=16,
            num_train_epochs=4,
            logging_steps=4,
            bf16=False,  # TRL's default, bf16, wants a GPU
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(DATA),
        peft_config=S2FTConfig(budget=0.02, strategy="weight", task_type="CAUSAL_LM"),
    )
    steps = len(trainer.get_train_dataloader()) * trainer.args.num_train_epochs
    trainer.args.learning_rate = learning_rate(
        trainer.model, steps
    )  # TRL's default is for whole models: far too low here
    with in_place(trainer.model):
        trainer.train()
    trainer.save_model(folder)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}; the adapter is in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs/sft"])
