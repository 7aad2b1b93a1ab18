"""The loss of a training step comes from TRL's head, in chunks: as from all logits at once, and without them in memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import get_peft_model
from trl.kernels import chunked_logprob
from trl.trainer import utils
from trl.trainer.utils import add_fused_lm_head

from s2ft import S2FTConfig
from s2ft.finetune.head import TOKENS, VOCABULARY, small_tiles
from s2ft.lab.bench.contestants import Contestant, chunked_head
from s2ft.runtime.memory import peak_of, saved_bytes

WORDS = 40_003  # more than a chunk of TRL's
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": WORDS,
    "pad_token_id": 0,
}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "capped": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
    "scaled": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=2.5)),
}


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, WORDS, (rows, length))
    labels = ids.masked_fill(torch.rand(rows, length) < 0.4, -100)
    labels[0] = -100  # a row without a response
    return {"input_ids": ids, "labels": labels}


def by_all_logits(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=given["input_ids"], use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_in_small_tiles_are_those_of_all_logits(kind, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    base = MODELS[kind]()
    model = get_peft_model(base, S2FTConfig(ratios=0.5, seed=0, init_weights=False))
    trained = [one for one in model.parameters() if one.requires_grad]
    add_fused_lm_head(base)
    given = batch(3, 1 + TOKENS // 2)  # a tile of tokens, and half of one
    expected = by_all_logits(model, given)
    wanted = torch.autograd.grad(expected, trained)
    usual = chunked_logprob.TOKEN_CHUNK_SIZE
    with small_tiles():
        assert chunked_logprob.TOKEN_CHUNK_SIZE == TOKENS < usual
        loss = model(**given, use_cache=False, fused_lm_head=True).loss
        found = torch.autograd.grad(loss, trained)
    assert usual == chunked_logprob.TOKEN_CHUNK_SIZE
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("available", [False, True])
def test_tiles_are_small_on_a_cpu_alone(available, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: available)
    usual = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    assert usual > VOCABULARY
    with small_tiles():
        assert (usual if available else VOCABULARY) == utils._CHUNKED_LOGPROB_CHUNK_SIZE
    assert usual == utils._CHUNKED_LOGPROB_CHUNK_SIZE


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_all_logits(kind):
    base = MODELS[kind]().double()
    model = get_peft_model(base, S2FTConfig(ratios=0.5, seed=0, init_weights=False), autocast_adapter_dtype=False)
    add_fused_lm_head(base)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert trained
    for rows, length in ((3, 7), (2, 1), (1, 13), (2, 30)):
        given = batch(rows + 1, length + 1)
        expected = by_all_logits(model, given)
        found = model(**given, use_cache=False, fused_lm_head=True).loss
        if not (given["labels"][:, 1:] != -100).any():
            continue
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)  # TRL adds up in float32
        wanted = torch.autograd.grad(expected, list(trained.values()))
        for name, ours, theirs in zip(trained, torch.autograd.grad(found, list(trained.values())), wanted, strict=True):
            assert theirs.abs().max() > 0, name
            assert (ours - theirs).norm() < 1e-5 * theirs.norm(), name


def test_all_logits_are_never_kept():
    base = MODELS["llama"]()
    add_fused_lm_head(base)
    given = batch(4, 65)
    logits = 4 * 64 * WORDS * 4
    own = list(base.parameters())
    assert saved_bytes(lambda: base(**given, use_cache=False, fused_lm_head=True).loss, own) < logits / 2
    assert saved_bytes(lambda: by_all_logits(base, given), own) >= logits


def test_a_contestant_of_the_benchmark_takes_the_same_loss_by_both():
    base = MODELS["llama"]().requires_grad_(False)
    ids, losses = torch.randint(1, WORDS, (2, 9)), []
    with chunked_head(base):
        for chunked in (False, True):
            contestant = Contestant(base, chunked=chunked)
            contestant.step(ids)
            inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
            losses.append(base(**inputs, **({"fused_lm_head": True} if chunked else {})).loss)
    torch.testing.assert_close(*losses)
    assert "forward" not in vars(base)
    assert type(copy.deepcopy(base).forward) is type(base.forward)


def test_the_peak_of_a_call_is_what_it_takes_beside_what_is_held():
    size = 64 << 20
    held = torch.ones(size, dtype=torch.uint8)
    peak = peak_of(lambda: torch.ones(size, dtype=torch.uint8)[0].item(), torch.device("cpu"))
    if peak is None:
        pytest.skip("this system keeps no peak that can be reset")
    assert size * 0.9 < peak < 3 * size
    assert held.numel() == size
