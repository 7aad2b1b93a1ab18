"""Embeddings: texts that mean the same come nearer, by sentence-transformers' trainer and a slice of each block.

python examples/embed.py runs/embed    (after pip install sentence-transformers)
"""

import random
import sys

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from s2ft import S2FTConfig, in_place
from s2ft.demo import base_path
from s2ft.demo.skills import SKILLS

MODEL = str(base_path())  # your model: an encoder or a decoder, a folder or a name on the Hub
NAMES = ("reverse", "river", "add")  # your pairs: two texts that mean the same; here, two questions of one kind
EACH = 60  # questions of a kind


def questions(name: str, seed: int) -> list[str]:
    return [row["prompt"] for row in SKILLS[name].examples(EACH, seed=seed)]


def load() -> SentenceTransformer:
    transformer = Transformer(MODEL)
    transformer.tokenizer.pad_token = transformer.tokenizer.pad_token or transformer.tokenizer.eos_token
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")


def together(model: SentenceTransformer) -> float:
    """How much nearer questions of one kind are than those of another: the difference of mean similarities."""
    own, other = [], []
    embedded = {name: model.encode(questions(name, seed=9), convert_to_tensor=True) for name in NAMES}
    for name in NAMES:
        own.append(model.similarity(embedded[name], embedded[name]).mean().item())
        other += [model.similarity(embedded[name], embedded[x]).mean().item() for x in NAMES if x != name]
    return sum(own) / len(own) - sum(other) / len(other)


def main(folder: str) -> None:
    model = load()
    before = together(model)
    model.add_adapter(S2FTConfig(budget=0.02, strategy="weight", task_type="FEATURE_EXTRACTION"))
    pairs = [pair for name in NAMES for pair in zip(questions(name, 0), questions(name, 1), strict=True)]
    random.Random(0).shuffle(pairs)
    arguments = SentenceTransformerTrainingArguments(
        folder,
        per_device_train_batch_size=12,
        num_train_epochs=2,
        learning_rate=3e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [b for _, b in pairs]})
    trainer = SentenceTransformerTrainer(model, arguments, rows, loss=MultipleNegativesRankingLoss(model))
    with in_place(model):
        trainer.train()
    model.save_pretrained(folder)

    again = load()
    again.load_adapter(folder)
    print(
        f"nearer by {before:.3f} → {together(model):.3f}, loaded again {together(again):.3f}; the adapter is in {folder}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs/embed"])
