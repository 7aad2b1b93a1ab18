"""Classification: a slice of each block and the whole head, by transformers' `Trainer`. An encoder is trained alike.

python examples/classify.py runs/classify
"""

import sys

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from s2ft import S2FTConfig, in_place
from s2ft.demo import base_path
from s2ft.demo.skills import SKILLS

MODEL = str(base_path())  # your model: an encoder or a decoder, a folder or a name on the Hub
LABELS = ("reverse", "river", "add")  # your classes: a word, a name, a sum
DATA = [
    (row["prompt"].partition(": ")[2], label)
    for label, name in enumerate(LABELS)
    for row in SKILLS[name].examples(80, seed=0)
]


def load() -> PreTrainedModel:
    torch.manual_seed(0)  # of the head, which is new
    return AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=len(LABELS))


def main(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = get_peft_model(load(), S2FTConfig(budget=0.02, strategy="weight", task_type="SEQ_CLS"))
    rows = [{**tokenizer(text), "labels": label} for text, label in DATA]
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=16,
        num_train_epochs=3,
        learning_rate=3e-3,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
    with in_place(model):
        trainer.train()
    trainer.save_model(folder)

    again = PeftModel.from_pretrained(load(), folder).eval()  # the slices and the head
    batch = tokenizer([text for text, _ in DATA], padding=True, return_tensors="pt")
    with torch.no_grad():
        right = again(**batch).logits.argmax(-1) == torch.tensor([label for _, label in DATA])
    print(f"right: {right.float().mean():.3f} of {len(DATA)} texts; the adapter is in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs/classify"])
