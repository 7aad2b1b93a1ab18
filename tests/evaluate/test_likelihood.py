"""Likelihoods against transformers' own loss, and against the same sum written out in float64."""

import math
from functools import partial, wraps

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import BloomConfig, BloomForCausalLM

from families import build, hybrid
from s2ft import S2FTError
from s2ft.demo import base_path
from s2ft.evaluate import likelihood
from s2ft.evaluate.likelihood import Choice, accuracy, choice, log_likelihoods, perplexity, token_log_likelihoods
from s2ft.runtime.models import load_model, load_tokenizer
from tiny_base import byte_tokenizer


@pytest.fixture(scope="module")
def model():
    return load_model(str(base_path()), torch.float64)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(base_path()))


def one_by_one(model, given: list[int], follows: list[int]) -> torch.Tensor:
    """log p of each token, from a row by itself and all its logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*given, *follows]])).logits[0]
    return log_softmax(logits, -1)[len(given) - 1 : -1].gather(-1, torch.tensor(follows)[:, None])[:, 0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # positions by rotation, and learned ones
def test_rows_of_several_lengths_score_as_they_do_alone(family: str) -> None:
    model = build(family)
    given = [torch.randint(0, 30, (length,)).tolist() for length in (1, 9, 4, 12)]
    follows = [torch.randint(0, 30, (length,)).tolist() for length in (6, 1, 11, 3)]
    found = token_log_likelihoods(model, given, follows)
    for row, before, after in zip(found, given, follows, strict=True):
        torch.testing.assert_close(row.double(), one_by_one(model, before, after), rtol=1e-5, atol=1e-5)


def test_a_tokenizer_that_ends_every_text_does_not_end_what_is_given(model) -> None:
    pairs = [("Answer:", " yes"), ("Question: so?", " no")]
    plain, ending = (byte_tokenizer(None, [], around) for around in (None, "$A <eos>"))
    assert log_likelihoods(model, ending, pairs) == log_likelihoods(model, plain, pairs)


def bloom():
    """Takes no positions."""
    return BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=4)).double().eval()


@pytest.mark.parametrize(
    "make", [*(partial(build, family) for family in ("llama", "gpt2", "mistral", "gemma3")), hybrid, bloom]
)
def test_what_several_rows_have_in_common_may_be_read_once(make) -> None:
    model = make()
    given = [torch.randint(1, 30, (length,)).tolist() for length in (1, 9, 4)]
    follows = [[torch.randint(1, 30, (length,)).tolist() for length in own] for own in ((6, 1), (3,), (1, 0, 12, 2))]
    wanted = [
        float(one_by_one(model, before, after).sum())
        for before, texts in zip(given, follows, strict=True)
        for after in texts
    ]
    assert likelihood._sums(model, given, follows) == pytest.approx(wanted, rel=1e-5)


def test_answers_of_one_token_need_no_second_pass(model, monkeypatch) -> None:
    forward, passes = model.forward, []

    @wraps(forward)
    def noting(**inputs):
        passes.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", noting)
    likelihood._sums(model, [[5, 6], [7]], [[[1], [2], [3]], [[4], [5]]])
    assert passes == [(2, 2)]


def test_every_module_is_left_in_its_mode(model) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    token_log_likelihoods(model, [[1, 2]], [[3]])
    assert [module.training for module in model.modules()] == modes
    model.eval()


def test_pairs_keep_their_order(model, tokenizer) -> None:
    pairs = [("add: 1+1\n", "2"), ("a longer prompt than the others\n", "and its end"), ("x", "y")]
    found = log_likelihoods(model, tokenizer, pairs, batch_size=2)
    for value, (before, after) in zip(found, pairs, strict=True):
        assert value == pytest.approx(float(one_by_one(model, [*before.encode()], [*after.encode()]).sum()), rel=1e-5)


def test_perplexity_is_that_of_the_loss_of_each_window(model, tokenizer) -> None:
    text, window = "".join(map(chr, torch.randint(97, 123, (70,)).tolist())), 32
    ids = torch.tensor([[*text.encode()]])[:, :60]
    losses, counts = [], []
    for start in range(0, 60, window):
        part = ids[:, start : start + window]
        losses.append(float(model(input_ids=part, labels=part).loss.detach()) * (part.shape[1] - 1))
        counts.append(part.shape[1] - 1)
    wanted = math.exp(sum(losses) / sum(counts))
    assert perplexity(model, tokenizer, text, window, limit=60) == pytest.approx(wanted, rel=1e-5)


def test_a_text_of_one_token_has_no_perplexity(model, tokenizer) -> None:
    with pytest.raises(S2FTError, match="a text of 1 tokens has no perplexity"):
        perplexity(model, tokenizer, "a")


def test_the_likeliest_per_byte_is_chosen(model, tokenizer) -> None:
    questions = [Choice("add: 3+4", ("7", "9"), 0), Choice("recall: Dovota", ("a long wrong answer", "Nite"), 1)]
    prompts = [f"Question: {one.question}\nAnswer:" for one in questions]
    right = 0
    for one, prompt in zip(questions, prompts, strict=True):
        texts = [f" {text}" for text in one.answers]
        sums = [float(one_by_one(model, [*prompt.encode()], [*text.encode()]).sum()) for text in texts]
        means = [total / len(text.encode()) for total, text in zip(sums, one.answers, strict=True)]
        right += means.index(max(means)) == one.right
    assert accuracy(model, tokenizer, questions) == right / 2


@pytest.mark.parametrize(
    ("instruction", "gold", "wanted"),
    [
        (
            "Please answer the following question with true or false, question: is ice cold?\n\nAnswer format: true/false",
            "true",
            Choice("is ice cold?", ("yes", "no"), 0),
        ),
        (
            "Please choose the correct answer to the question: Who?\n\nAnswer1: a man. Answer2: a dog Answer3: nobody\n\n"
            "Answer format: answer1/answer2/answer3",
            "3",
            Choice("Who?", ("a man.", "a dog", "nobody"), 2),
        ),
        (
            "Please choose the correct answer to fill in the blank to complete the given sentence: Ann saw Bea, so _ waved."
            "\n\nOption1: Ann Option2: Bea Answer format: option1/option2",
            "option2",
            Choice("Ann saw Bea, so _ waved.", ("Ann", "Bea"), 1),
        ),
    ],
)
def test_questions_are_taken_apart(instruction: str, gold: str, wanted: Choice) -> None:
    assert choice(instruction, gold) == wanted


def test_what_has_no_question_or_not_that_answer_is_refused() -> None:
    with pytest.raises(S2FTError, match="no question in 'Add 1 and 2'"):
        choice("Add 1 and 2", "3")
    with pytest.raises(S2FTError, match="answer 'answer4' is none of 1, 2"):
        choice("the question: Who?\n\nAnswer1: a Answer2: b", "answer4")
