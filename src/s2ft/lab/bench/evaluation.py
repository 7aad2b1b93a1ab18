"""How fast does `s2ft eval` write answers beside transformers' own `generate`, on equal settings?

    s2ft eval               its engine: prompts of like length share a batch, the longest first
    generate, same batches  tokenizer with padding, `model.generate`, decoding, on those very batches: the reference
    generate, file order    the same calls on batches in the order of the questions: what one writes without sorting

    ratio = median time / median time of the reference        differing = answers that are not the reference's

Each is timed from texts to texts. They take turns, all prompts in each turn, in an order that is drawn anew each round.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2ft.common.errors import raise_together
from s2ft.data.prompts import alpaca_prompt
from s2ft.demo import base_path
from s2ft.evaluate.engines import TransformersEngine, batches, prompt_ids
from s2ft.evaluate.options import EvalOptions
from s2ft.evaluate.questions import digest, load_questions
from s2ft.evaluate.tasks import DECODING, TASKS, Decoding
from s2ft.lab.bench.report import Report
from s2ft.lab.registry import TellShare
from s2ft.runtime.models import load_model, load_tokenizer, positions
from s2ft.runtime.timing import milliseconds, spread

TASK = TASKS["gsm8k"]
BATCH_SIZE: int = EvalOptions.model_fields["batch_size"].default
REFERENCE = "generate, same batches"
SEED = 0
# Characters of GSM8K's test questions: their logarithm is close to normal
SHORTEST, MEDIAN, LONGEST, LOG_DEVIATION = 73, 222, 848, 0.39
HALF_A_SENTENCE = 11  # characters: a story ends at the sentence nearest to its length

Row = dict[str, Any]
Texts = dict[int, str | None]  # index of the prompt → what was written; None where nothing could be
AnswerAll = Callable[[], Iterator[Texts]]  # answers all prompts, batch by batch


def bench_evaluation(
    name: str = str(base_path()),
    data: str | None = None,
    limit: int = 200,
    rounds: int = 3,
    decoding: Decoding = DECODING[TASK.suite],
    tell: TellShare = lambda done: None,
) -> Report:
    """Times how `limit` questions are answered, in each of `rounds`; a few of them warm up.

    A row has the keys method, prompts, batch_size, beams, max_new_tokens, seconds (and its p20 and p80), ratio, differing.

    Args:
        name: The model: a folder or a name on the Hub; the embedded base unless given.
        data: A folder (or a data set on the Hub) laid out like LLM-Adapters; none: questions made from a seed.
        limit: Use only the first N questions.
        rounds: How often each contestant answers all of them.
        decoding: How answers are written.
        tell: Is told the share that is done.

    Raises:
        S2FTError: for a number below 1, data without GSM8K, or a question that leaves too little room for its answer; before
            anything is timed.
    """
    numbers = {"limit": limit, "rounds": rounds, **vars(decoding)}
    raise_together(f"{which}={value} must be 1 or more" for which, value in numbers.items() if value < 1)
    prompts = made_prompts(limit, SEED) if data is None else _prompts(data, limit)
    tokenizer, model = load_tokenizer(name), load_model(name, torch.float32)
    _check_room(prompts, tokenizer, model, decoding)
    for warm_up in contestants(model, tokenizer, prompts[:BATCH_SIZE], decoding).values():
        list(warm_up())
    times, texts = _take_turns(contestants(model, tokenizer, prompts, decoding), rounds, len(prompts), tell)
    shared = {"prompts": len(prompts), "batch_size": BATCH_SIZE, **vars(decoding)}
    rows = [_row(contestant, times, texts, shared) for contestant in times]
    return Report(settings=_settings(Path(name).name, data, prompts, rounds), rows=rows)


def contestants(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], decoding: Decoding
) -> dict[str, AnswerAll]:
    """Name → a call that answers all prompts."""
    count, room = len(prompts), decoding.max_new_tokens
    same = batches([len(prompt_ids(tokenizer, prompt)) for prompt in prompts], [room] * count, BATCH_SIZE)
    in_order = [list(range(count))[start : start + BATCH_SIZE] for start in range(0, count, BATCH_SIZE)]
    return {
        "s2ft eval": lambda: _by_engine(model, tokenizer, prompts, decoding),
        REFERENCE: lambda: _by_generate(model, tokenizer, prompts, same, decoding),
        "generate, file order": lambda: _by_generate(model, tokenizer, prompts, in_order, decoding),
    }


def made_prompts(count: int, seed: int) -> list[str]:
    """Sums in words, in the words of training; their lengths are spread like those of GSM8K's questions.

    Example:
        >>> made_prompts(2, seed=0) == made_prompts(3, seed=0)[:2]
        True
    """
    rng = random.Random(seed)
    return [alpaca_prompt(_sum_in_words(rng)) for _ in range(count)]


def evaluation_line(row: Row) -> dict[str, str]:
    """A row of the table, in units for people."""
    return {
        "method": row["method"],
        "seconds": f"{row['seconds']:.1f} ({row['seconds_p20']:.1f}–{row['seconds_p80']:.1f})",
        "answers / s": f"{row['prompts'] / row['seconds']:.2f}",
        "/ generate": f"{row['ratio']:.3f}",
        "differing": f"{row['differing']} of {row['prompts']}",
    }


def _sum_in_words(rng: random.Random) -> str:
    length = min(max(MEDIAN * rng.lognormvariate(0, LOG_DEVIATION), SHORTEST), LONGEST)
    thing = rng.choice(["apples", "books", "coins", "eggs", "marbles", "stamps"])
    told, question = "", f"How many {thing} are there in all?"
    while len(told) + len(question) < length - HALF_A_SENTENCE:
        told += f"{rng.choice(['Ann', 'Ben', 'Carla', 'David'])} has {rng.randint(2, 99)} {thing}. "
    return told + question


def _prompts(data: str, limit: int) -> list[str]:
    return [str(question.prompt) for question in load_questions(TASK, data, limit)]


def _check_room(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, decoding: Decoding
) -> None:
    """Refuses questions without room for an answer: the engine would cut such an answer short, `generate` would not."""
    longest, wanted = positions(model), decoding.max_new_tokens
    lengths = [len(prompt_ids(tokenizer, prompt)) for prompt in prompts]
    raise_together(
        f"question {number} has {length} tokens; with max_new_tokens={wanted} that is more than the model's {longest}"
        for number, length in enumerate(lengths, start=1)
        if longest is not None and length + wanted > longest
    )


def _by_engine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], decoding: Decoding
) -> Iterator[Texts]:
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    for batch in TransformersEngine(model, tokenizer, BATCH_SIZE).answers(ids, decoding):
        yield {index: answer.text for index, answer in batch}


def _by_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    groups: Sequence[list[int]],  # indices of the prompts, a batch each
    decoding: Decoding,
) -> Iterator[Texts]:
    for group in groups:
        texts = [prompts[index] for index in group]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(
            **inputs, num_beams=decoding.beams, max_new_tokens=decoding.max_new_tokens, do_sample=False
        )  # [prompts, longest + new]
        new = output[:, inputs["input_ids"].shape[1] :]
        yield dict(zip(group, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True))


def _take_turns(
    turns: Mapping[str, AnswerAll], rounds: int, prompts: int, tell: TellShare
) -> tuple[dict[str, list[float]], dict[str, list[Texts]]]:
    """Of each contestant, a time in seconds and the texts for each round."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    texts: dict[str, list[Texts]] = {name: [] for name in turns}

    def answer(name: str) -> None:
        for batch in turns[name]():
            texts[name][-1].update(batch)
            done = sum(len(answered) for own in texts.values() for answered in own)
            tell(done / (rounds * len(turns) * prompts))

    for _ in range(rounds):
        for name in random.sample(list(turns), len(turns)):
            texts[name].append({})
            times[name].append(milliseconds(partial(answer, name)) / 1e3)
    return times, texts


def _row(name: str, times: Mapping[str, list[float]], texts: Mapping[str, list[Texts]], shared: Row) -> Row:
    own, reference = spread(times[name], "seconds"), spread(times[REFERENCE], "seconds")
    return {
        "method": name,
        **shared,
        **own,
        "ratio": own["seconds"] / reference["seconds"],
        "differing": _differing(texts[name], texts[REFERENCE][0]),
    }


def _differing(rounds: Sequence[Texts], reference: Texts) -> int:
    """How many prompts got in any round another answer than in the reference's first; its own later rounds count too."""
    return sum(any(texts.get(index) != text for texts in rounds) for index, text in reference.items())


def _settings(model: str, data: str | None, prompts: Sequence[str], rounds: int) -> Row:
    made = f"made from seed {SEED}: sums in words, with lengths spread like those of GSM8K's questions"
    return {
        "questions": made if data is None else f"the first {len(prompts)} of {TASK.name}",
        "questions_digest": digest(list(prompts)),
        "model": model,
        "dtype": "float32",
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }
