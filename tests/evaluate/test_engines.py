"""Generation in batches says what the model says, against a plain loop; failures stay with their prompt."""

import copy
import sys
import types

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from s2ft import S2FTConfig, S2FTError
from s2ft.evaluate.engines import Answer, TransformersEngine, VllmEngine, batches, end_ids, prompt_ids
from s2ft.evaluate.tasks import Decoding
from tiny_base import CHATML, CHATML_TOKENS, byte_tokenizer, tiny_model

GREEDY = Decoding(1, 12)
END = 1


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Random weights, in float64 so that padding changes no choice; its answers end now and then."""
    model = tiny_model().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def random_prompts(count: int) -> list[list[int]]:
    return [torch.randint(2, 258, (int(torch.randint(1, 30, ())),)).tolist() for _ in range(count)]


def collect(engine, prompts, decoding=GREEDY, done=()) -> dict[int, Answer]:
    return {index: answer for batch in engine.answers(prompts, decoding, done) for index, answer in batch}


@torch.no_grad()
def plain_greedy(model, prompt: list[int], limit: int, ends: tuple[int, ...] = (END,)) -> Answer:
    """One prompt, no padding, no cache: the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(limit):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    new = ids[len(prompt) :]
    ended = new[-1] in ends
    return Answer(byte_tokenizer().decode(new[:-1] if ended else new, skip_special_tokens=True), truncated=not ended)


@torch.no_grad()
def plain_beams(model, prompt: list[int], limit: int, width: int) -> str:
    """Beam search over log-probabilities per token, by its definition, without batches or cache."""
    running, finished = [(0.0, list(prompt))], []
    for step in range(1, limit + 1):
        grown = []
        for score, ids in running:
            logs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            grown += [(score + float(log), [*ids, token]) for token, log in enumerate(logs)]
        grown = sorted(grown, key=lambda pair: -pair[0])[: 2 * width]
        finished += [(score / step, ids) for score, ids in grown[:width] if ids[-1] == END]
        finished = sorted(finished, key=lambda pair: -pair[0])[:width]
        running = [(score, ids) for score, ids in grown if ids[-1] != END][:width]
        if len(finished) == width and finished[-1][0] >= running[0][0] / step:
            break
    finished += [(score / limit, ids) for score, ids in running] if step == limit else []
    best = max(finished, key=lambda pair: pair[0])[1][len(prompt) :]
    return byte_tokenizer().decode([token for token in best if token != END], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_answer_as_a_plain_loop_does(model, batch_size) -> None:
    with torch.no_grad():
        model.lm_head.weight[END] += 0.25  # ends often enough
    prompts = random_prompts(9)
    found = collect(TransformersEngine(model, byte_tokenizer(), batch_size), prompts)
    assert [found[index] for index in range(9)] == [plain_greedy(model, prompt, 12) for prompt in prompts]


def test_beams_answer_as_beam_search_by_its_definition(model) -> None:
    prompts = random_prompts(4)
    found = collect(TransformersEngine(model, byte_tokenizer(), 3), prompts, Decoding(4, 6))
    assert [found[index].text for index in range(4)] == [plain_beams(model, prompt, 6, 4) for prompt in prompts]


def test_the_models_own_ways_of_generating_are_left_out_and_come_back(model) -> None:
    prompts = random_prompts(3)
    expected = collect(TransformersEngine(model, byte_tokenizer()), prompts)
    own = model.generation_config
    own.update(do_sample=True, temperature=3.0, repetition_penalty=9.0, max_length=3, no_repeat_ngram_size=1)
    model.train()
    model.model.layers[0].eval()
    assert collect(TransformersEngine(model, byte_tokenizer()), prompts) == expected
    assert model.generation_config is own
    assert model.training
    assert not model.model.layers[0].training


def test_answers_end_at_any_token_that_the_model_names(model) -> None:
    prompts = random_prompts(6)
    whole = collect(TransformersEngine(model, byte_tokenizer()), prompts)
    word = next(answer.text for answer in whole.values() if answer.text)
    second_end = byte_tokenizer()(word)["input_ids"][0]
    model.generation_config.eos_token_id = [second_end, END]
    assert end_ids(model, byte_tokenizer()) == [END, second_end]
    found = collect(TransformersEngine(model, byte_tokenizer()), prompts)
    assert any(not found[index].truncated and whole[index].truncated for index in whole)


def test_answers_end_where_the_chat_template_ends_a_turn(model) -> None:
    model.resize_token_embeddings(260, mean_resizing=False)
    tokenizer = byte_tokenizer(CHATML, CHATML_TOKENS)
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": word}]) for word in ("a", "bc", "def", "g" * 9)]
    prompts += random_prompts(6)
    with torch.no_grad():
        said = model.generate(
            input_ids=torch.tensor(prompts[:1]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        model.lm_head.weight[turn_end] = 1.5 * model.lm_head.weight[said[0, -1]]  # likelier than what was said
    expected = [plain_greedy(model, prompt, 12, (END, turn_end)) for prompt in prompts]
    assert expected != [plain_greedy(model, prompt, 12) for prompt in prompts]
    found = collect(TransformersEngine(model, tokenizer, 3), prompts)
    assert [found[index] for index in range(10)] == expected


def test_a_prompt_that_leaves_no_room_is_an_error_and_little_room_is_used(model) -> None:
    model.config.max_position_embeddings = 20
    prompts = [[5] * 20, [5] * 30, [7] * 17, [9] * 4]
    found = collect(TransformersEngine(model, byte_tokenizer(), 2), prompts)
    assert found[0] == Answer(None, error="the prompt has 20 tokens; the model has room for 20, answer included")
    assert found[1].error.startswith("the prompt has 30 tokens")
    assert found[2] == plain_greedy(model, prompts[2], 3)
    assert found[3] == plain_greedy(model, prompts[3], 12)


@pytest.mark.parametrize(
    ("failure", "said"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "out of memory"), (KeyError("odd"), "KeyError: 'odd'")],
)
def test_a_batch_that_fails_is_halved_until_its_culprit_stands_alone(model, monkeypatch, failure, said) -> None:
    prompts = random_prompts(7)
    expected = collect(TransformersEngine(model, byte_tokenizer()), prompts)
    prompts[4] = [42] * 40
    generate = model.generate

    def failing(**inputs):
        if (inputs["input_ids"] == 42).sum(1).max() == 40:
            raise failure
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", failing)
    found = collect(TransformersEngine(model, byte_tokenizer(), 7), prompts)
    assert found[4] == Answer(None, error=said)
    assert {**found, 4: None} == {**expected, 4: None}


def test_large_batches_that_lack_memory_become_small_ones(model, monkeypatch) -> None:
    prompts = random_prompts(8)
    expected = collect(TransformersEngine(model, byte_tokenizer()), prompts)
    generate, sizes = model.generate, []

    def failing(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", failing)
    assert collect(TransformersEngine(model, byte_tokenizer(), 8), prompts) == expected
    assert sizes == [8, 4, 2, 2, 4, 2, 2]


def test_ctrl_c_is_no_failed_answer(model, monkeypatch) -> None:
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(TransformersEngine(model, byte_tokenizer()), [[5]])


def test_batches_are_the_same_whatever_is_done_already(model, monkeypatch) -> None:
    prompts, seen = random_prompts(10), []

    def ending_at_once(input_ids, **_):
        seen.append(input_ids)
        ended = torch.cat([input_ids, torch.full_like(input_ids[:, :1], END)], 1)
        return types.SimpleNamespace(sequences=ended, past_key_values=None)

    monkeypatch.setattr(model, "generate", ending_at_once)
    engine = TransformersEngine(model, byte_tokenizer(), 3)
    assert len(collect(engine, prompts)) == 10
    whole = seen[:]
    seen.clear()
    done = {index for batch in batches([len(ids) for ids in prompts], [12] * 10, 3)[:2] for index in batch}
    assert set(collect(engine, prompts, done=done)) == set(range(10)) - done
    assert all(torch.equal(now, before) for now, before in zip(seen, whole[2:], strict=True))


def test_an_adapter_answers_as_its_merged_model(model) -> None:
    tuned = get_peft_model(copy.deepcopy(model), S2FTConfig(ratios=0.5, init_weights=False))
    prompts = random_prompts(5)
    found = collect(TransformersEngine(tuned, byte_tokenizer(), 2), prompts)
    merged = tuned.merge_and_unload()
    assert [found[index] for index in range(5)] == [plain_greedy(merged, prompt, 12) for prompt in prompts]
    assert found != collect(TransformersEngine(model, byte_tokenizer()), prompts)


class FakeVllm:
    """vLLM's interface, answered by a plain loop."""

    made: list = []  # noqa: RUF012

    def __init__(self, model, dtype) -> None:
        self.model, self.dtype = model, dtype
        FakeVllm.made.append(self)

    def get_tokenizer(self):
        return byte_tokenizer()

    def generate(self, prompts, settings, use_tqdm):
        assert settings["temperature"] == 0
        outputs = []
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            if len(ids) > 25:
                raise ValueError("prompt too long")
            answer = plain_greedy(self.model, ids, settings["max_tokens"])
            one = types.SimpleNamespace(text=answer.text, finish_reason="length" if answer.truncated else "stop")
            outputs.append(types.SimpleNamespace(outputs=[one]))
        return outputs

    def beam_search(self, prompts, settings):
        new = byte_tokenizer()("four")["input_ids"]
        tokens = [prompt["prompt_token_ids"] + new + [END] * (settings["beam_width"] == 4) for prompt in prompts]
        return [types.SimpleNamespace(sequences=[types.SimpleNamespace(tokens=ids)]) for ids in tokens]


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeVllm, dict
    params = types.ModuleType("vllm.sampling_params")
    params.BeamSearchParams = dict
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)


def test_vllm_is_given_the_same_prompts(model, vllm) -> None:
    prompts = [[5] * 26, *random_prompts(4)]
    prompts[1:] = [prompt[:25] for prompt in prompts[1:]]
    ours = collect(TransformersEngine(model, byte_tokenizer()), prompts)
    engine = VllmEngine(model, "float32", [END])
    found = collect(engine, prompts, done=[2])
    assert found[0] == Answer(None, error="ValueError: prompt too long")
    assert {index: found[index] for index in (1, 3, 4)} == {index: ours[index] for index in (1, 3, 4)}
    assert collect(engine, prompts, Decoding(4, 9))[3] == Answer("four")
    assert collect(engine, prompts, Decoding(3, 9))[3] == Answer("four", truncated=True)


def test_vllm_that_is_not_installed_is_said_to_be(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(S2FTError, match="engine='vllm' needs vLLM, which is not installed"):
        VllmEngine("m", "float32", [END])
