"""`s2ft serve` under load: many clients ask a base and its adapters greedy questions whose answers are known.

    load     `clients` at once, each asking one question after the other, for all adapters and the base in turn
    single   the same questions to the same server, one at a time
    merged   `clients` at once, to a server of one merged model without adapters: what a batch costs if nothing is mixed
    vllm     as load, by `s2ft serve --engine vllm` of another Python that has vLLM (`--vllm PYTHON`)

The model is served without tokens that end an answer, so that all answers have the length that is asked for. An answer is wrong
if it is not the text that `generate` writes for that model alone, in float32. Questions whose two best tokens are nearly
tied at some place are left out, since there the rounding of another batch may decide.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2ft.adapters.merge import merge
from s2ft.common.errors import S2FTError
from s2ft.data.tokens import text_ids
from s2ft.demo import base_path
from s2ft.evaluate.engines import end_ids
from s2ft.format.config import S2FTConfig
from s2ft.lab.bench.clients import Question, ask_for
from s2ft.lab.bench.report import Report, model_label
from s2ft.lab.bench.servers import Running, running
from s2ft.lab.registry import TellShare
from s2ft.layer.linear import sliced_layers
from s2ft.runtime.models import load_model, load_tokenizer
from s2ft.serve.text import Text
from s2ft.tuner.model import S2FTModel  # noqa: F401 - PEFT knows the method from here on

BASE = "base"  # what the servers call it
TEXTS = (
    "reverse: planet\n",
    "The capital of France is",
    "Q: What is 17 + 25?\nA:",
    "def fibonacci(n):\n",
    "Once upon a time there was a",
    "sort: 4 1 3 2\n",
    "To make good bread, you need",
    "The three laws of robotics are",
)
LENGTHS = (16, 24, 32, 48)  # tokens of answers
MARGIN = 1e-2  # between the two largest logits; batches in float32 differ by less than 1e-3
SHARE = 0.2  # of the load's seconds, for each of the others
DELTA = 1.0  # the size of a random delta, in standard deviations of the weights that it changes

Row = dict[str, Any]


def bench_serve(
    model: str | None = None,
    clients: int = 64,
    adapters: int = 8,
    seconds: float = 300.0,
    vllm: str | None = None,
    tell: TellShare = lambda done: None,
) -> Report:
    """Rows: what, requests, failed, wrong, tokens_per_s, p50_ms, p95_ms, memory.

    Raises:
        S2FTError: if a number is not positive, or a server does not start.
    """
    _check(clients=clients, adapters=adapters, seconds=seconds)
    name = model or str(base_path())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        loaded, tokenizer = _without_end(name, root / "base")
        names = _make_adapters(loaded, root / "adapters", adapters)
        asked = _questions(loaded, tokenizer, root / "adapters", names)
        merged = merge(root / "adapters" / names[0], root / "merged", str(root / "base"))
        alone = _questions(load_model(str(merged), torch.float32).eval(), tokenizer)
        del loaded
        tell(0.1)
        short, many = SHARE * seconds, ["--precision", "fp32", "--name", BASE, "--rows", str(clients)]
        with_adapters = [str(root / "base"), "--adapters", str(root / "adapters"), *many]
        rows = []
        with running(with_adapters, root / "log") as server:
            rows.append(_measured("load", server, asked, clients, seconds))
            tell(0.7)
            rows.append(_measured("single", server, asked, 1, short))
        tell(0.8)
        with running([str(merged), *many], root / "log") as server:
            rows.append(_measured("merged", server, alone, clients, short))
        tell(0.9)
        if vllm is not None:
            with running([*with_adapters, "--engine", "vllm"], root / "log", vllm) as server:
                rows.append(_measured("vllm", server, asked, clients, short))
        tell(1.0)
    settings = {
        "model": model_label(model) if model else "embedded",
        "adapters": adapters,
        "seconds": seconds,
        "questions": len(asked),
    }
    ties = (adapters + 1) * len(TEXTS) - len(asked)
    return Report(settings={**settings, "near_ties": ties, "threads": torch.get_num_threads()}, rows=rows)


def _check(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < float("inf"):
            raise S2FTError(f"{name}={number} is not more than 0")


def _measured(what: str, server: Running, questions: Sequence[Question], clients: int, seconds: float) -> Row:
    first = list({question.model: question for question in questions}.values())
    ask_for(0, server.port, first, len(first))  # so that adapters are loaded before
    tally = ask_for(seconds, server.port, questions, clients)
    return {"what": what, "clients": clients, **tally.row(), "memory": server.bytes}


def _without_end(name: str, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, which is also saved in `folder`: the tokens that end an answer have a logit of 0, and end nothing."""
    model, tokenizer = load_model(name, torch.float32).eval(), load_tokenizer(name)
    head: Any = model.get_output_embeddings()
    weight = head.weight.detach().clone()  # on its own, if it was tied to the input's
    weight[end_ids(model, tokenizer)] = 0
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
    model.config.tie_word_embeddings = False
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = None
    tokenizer.eos_token = tokenizer.chat_template = None
    for one in (model, tokenizer):
        one.save_pretrained(folder)
    return model, tokenizer


def _make_adapters(model: PreTrainedModel, root: Path, count: int) -> list[str]:
    """Random adapters on channels of their own, large enough to change what the model says."""
    names = [f"adapter-{number}" for number in range(count)]
    for number, name in enumerate(names):
        config = S2FTConfig(budget=0.01, strategy="random", seed=number, task_type="CAUSAL_LM")
        tuned = get_peft_model(copy.deepcopy(model), config, adapter_name=name)
        for layer in sliced_layers(tuned, name).values():
            generator, size = torch.Generator().manual_seed(number), DELTA * float(layer.weight.std())
            layer.block(name).weight.data.normal_(std=size, generator=generator)
        tuned.save_pretrained(str(root))
    return names


def _questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, root: Path | None = None, names: Sequence[str] = ()
) -> list[Question]:
    """All texts for the base and every adapter, in turn, with the answers that `generate` writes."""
    found = [_answers(model, tokenizer, BASE)]
    for name in names:
        tuned = PeftModel.from_pretrained(copy.deepcopy(model), str(root / name)).eval()  # type: ignore[operator]
        found.append(_answers(tuned, tokenizer, name))
    by_text = [[answers[place] for answers in found] for place in range(len(TEXTS))]
    return [question for one_text in by_text for question in one_text if question is not None]


def _answers(model: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> list[Question | None]:
    """One for each text; None where two tokens are nearly tied."""
    found: list[Question | None] = []
    for number, text in enumerate(TEXTS):
        prompt, tokens = text_ids(tokenizer, text), LENGTHS[number % len(LENGTHS)]
        written, margin = _written(model, prompt, tokens)
        said = Text(tokenizer, prompt=prompt)
        answer = "".join(map(said.add, written)) + said.end()
        found.append(Question(name, tuple(prompt), tokens, answer) if margin > MARGIN else None)
    return found


@torch.no_grad()
def _written(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    """The answer's tokens, and the least distance between the best and the second."""
    ids = torch.tensor([prompt])
    told = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": tokens, "do_sample": False}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **told)
    best = torch.cat(out.logits).topk(2).values  # [tokens, 2]
    return out.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def serve_line(row: Row) -> dict[str, str]:
    """A row of the table."""
    return {
        "what": f"{row['what']} × {row['clients']}",
        "requests": str(row["requests"]),
        "failed": str(row["failed"]),
        "wrong": str(row["wrong"]),
        "tokens/s": f"{row['tokens_per_s']:.0f}",
        "p50 ms": f"{row['p50_ms']:.0f}",
        "p95 ms": f"{row['p95_ms']:.0f}",
        "MB": f"{row['memory'] / 1e6:.0f}",
    }
