r"""Pre-trains the embedded base model on the old skills and saves it, with its tokenizer, in Hugging Face format.

    python -m s2ft.demo.pretrain --output DIR

The model is a Llama with grouped-query attention that reads bytes. Examples are packed end to end, as in

    reverse: planet\ntenalp<|end|>add: 12+34\n46<|end|>...

and only the completions are predicted: the inputs are random letters, about which there is nothing to learn.
"""

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from s2ft.data.tokens import IGNORED
from s2ft.demo.evaluate import exact_match
from s2ft.demo.skills import OLD_SKILLS, SKILLS, Example

END, PAD = "<|end|>", "<|pad|>"
MAX_LENGTH = 2048
HEAD_DIM = 32
HEADS_PER_KV = 3
PACKED_LENGTH = 128
SHARES = {"add": 2, "sort": 3}  # examples of these for one of each other skill: they are the last to be learned

# A chat is written as the examples are, so the base model answers chat messages too; `generation` marks what TRL's
# assistant_only_loss trains. Nothing is to be added for the generation prompt: a question ends with its line.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ message['content'] + eos_token }}{%- endgeneration -%}"
    "{%- else -%}{{ message['content'] + '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
)


def byte_symbols() -> list[str]:
    """The printable character that byte-level BPE (GPT-2) writes for each byte, by byte value."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbol = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [symbol[byte] for byte in range(256)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Token n is byte n, so any text is encoded and decoded exactly, and a split of a text is a split of its tokens."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama with random weights; three heads share a key and a value.

    Args:
        hidden: Hidden size, a multiple of 96.
        layers: Blocks.
    """
    heads = hidden // HEAD_DIM
    if hidden % (HEAD_DIM * HEADS_PER_KV):
        raise ValueError(f"--hidden {hidden}: must be a multiple of {HEAD_DIM * HEADS_PER_KV} (groups of heads)")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // HEADS_PER_KV,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def draw_examples(seed: int) -> Iterator[Example]:
    """Training examples of the old skills without end, shuffled."""
    rng = random.Random(f"mixture/{seed}")
    for chunk in itertools.count(seed * 1_000_000_000):
        examples = [
            example for name in OLD_SKILLS for example in SKILLS[name].examples(128 * SHARES.get(name, 1), seed=chunk)
        ]
        rng.shuffle(examples)
        yield from examples


def pack(examples: Iterator[Example], tokenizer: PreTrainedTokenizerFast, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of tokens and labels, [rows, PACKED_LENGTH] each, with the prompts left out of the labels."""
    tokens: list[int] = []
    labels: list[int] = []
    size = rows * PACKED_LENGTH
    for example in examples:
        prompt = tokenizer(example["prompt"]).input_ids
        completion = tokenizer(example["completion"] + END).input_ids
        tokens += prompt + completion
        labels += [IGNORED] * len(prompt) + completion
        if len(tokens) >= size:
            yield torch.tensor(tokens[:size]).view(rows, -1), torch.tensor(labels[:size]).view(rows, -1)
            tokens, labels = tokens[size:], labels[size:]


def decay(step: int, steps: int) -> float:
    """The factor on the learning rates: linear warm-up over 2%, then a cosine down to zero."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def build_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the projections, AdamW for the rest: it needs under half of the tokens that AdamW alone needs here."""
    projections = [weight for name, weight in model.named_parameters() if name.endswith("_proj.weight")]
    others = [weight for name, weight in model.named_parameters() if not name.endswith("_proj.weight")]
    return [
        torch.optim.Muon(projections, lr=lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=0.15 * lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(model: LlamaForCausalLM, batches: Iterator[tuple[Tensor, Tensor]], steps: int, lr: float) -> None:
    """Under bf16 autocast, the weights themselves in fp32; prints the loss as it goes."""
    optimizers = build_optimizers(model, lr)
    schedules = [LambdaLR(optimizer, lambda step: decay(step, steps)) for optimizer in optimizers]
    started = time.perf_counter()
    recent = 0.0
    for step in range(1, steps + 1):
        tokens, labels = next(batches)
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model(input_ids=tokens.to(model.device), labels=labels.to(model.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        recent = 0.98 * recent + 0.02 * loss.item()
        if step % 100 == 0:
            rate = step * tokens.numel() / (time.perf_counter() - started)
            print(f"step {step:5d}/{steps}  loss {recent / (1 - 0.98**step):.4f}  {rate:,.0f} tokens/s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Writes the model in bf16, and its tokenizer, for transformers 4 and 5."""
    model.to(torch.bfloat16).save_pretrained(output)
    for file in output.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes it readable by its owner only; this file goes into the package
    tokenizer.save_pretrained(output)
    # Transformers 5 writes its new class name, which engines on transformers 4 do not know; both know the old one.
    settings = output / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def main() -> None:
    """Trains, saves, and prints the scores on the old skills."""
    parser = argparse.ArgumentParser(description="Pre-train the embedded base model on the old skills.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--rows", type=int, default=16, help=f"sequences of {PACKED_LENGTH} tokens in a batch")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate of Muon at its peak")
    parser.add_argument("--hidden", type=int, default=192, help="hidden size, a multiple of 96")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.hidden, args.layers).train()
    started = time.perf_counter()
    train(model, pack(draw_examples(args.seed), tokenizer, args.rows), args.steps, args.lr)
    minutes = (time.perf_counter() - started) / 60
    print(f"{args.steps * args.rows * PACKED_LENGTH / 1e6:.1f}M tokens in {minutes:.1f} min")

    save(model, tokenizer, args.output)
    model.float()  # scores are of the weights as saved, rounded to bf16
    for name, skill in SKILLS.items():
        score = exact_match(model, tokenizer, skill.examples(500, seed=args.seed, split="test"))
        print(f"{name:8s} {score.accuracy:.1%}")


if __name__ == "__main__":
    main()
