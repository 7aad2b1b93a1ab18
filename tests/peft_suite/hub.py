"""Stand-ins for the tiny random models that PEFT's tests fetch: the same architectures, made here, laid out as a Hub cache.

    HF_HOME/hub/models--ORG--NAME/{refs/main, snapshots/REVISION/{config.json, model.safetensors, tokenizer...}}

With HF_HUB_OFFLINE=1 every `from_pretrained("ORG/NAME")` then finds its model without the network.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

REVISION = "0" * 40
VOCABULARY = 1024
ADAPTER = "peft-internal-testing/tiny-opt-lora-revision"

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 3,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 5, "n_head": 4, "bos_token_id": 98, "eos_token_id": 98}
OPT = {
    "vocab_size": 50265,
    "hidden_size": 16,
    "ffn_dim": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 16,
    "dropout": 0.0,
    "max_position_embeddings": 100,
}


def gpt2() -> hf.PreTrainedModel:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**GPT))


def mistral() -> hf.PreTrainedModel:
    return hf.MistralForCausalLM(hf.MistralConfig(**DECODER))


def t5() -> hf.PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))


def bart() -> hf.PreTrainedModel:
    sides = {
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in (("layers", 2), ("attention_heads", 4))
    }
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4}
    # weights large enough that an adapter on q and v changes what is generated
    return hf.BartForConditionalGeneration(hf.BartConfig(**sizes, **sides, init_std=0.5))


def deberta_v2() -> hf.PreTrainedModel:
    return hf.DebertaV2Model(hf.DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"]))


def opt_125m() -> hf.PreTrainedModel:
    return hf.OPTForCausalLM(hf.OPTConfig(**{**OPT, "num_hidden_layers": 12, "max_position_embeddings": 2048}))


MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT)),
    "peft-internal-testing/opt-125m": opt_125m,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": gpt2,
    "hf-internal-testing/tiny-random-gpt2": gpt2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**GPT, rotary_dim=4)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**DECODER, head_dim=8)
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": mistral,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": t5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": bart,
    "peft-internal-testing/tiny-random-BertModel": lambda: hf.BertModel(hf.BertConfig(**ENCODER)),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: hf.RobertaModel(hf.RobertaConfig(**ENCODER)),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: hf.DebertaModel(hf.DebertaConfig(**ENCODER)),
    "peft-internal-testing/tiny-random-DebertaV2Model": deberta_v2,
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**ENCODER)
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(**ENCODER)
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: hf.LlamaForSequenceClassification(
        hf.LlamaConfig(**DECODER, num_labels=1)
    ),
}


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Bytes for tokens."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special, strict=True))
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names)


def fill(cache: Path) -> None:
    """Makes every model in the Hub cache `cache` that is not there yet, and the adapter whose config PEFT's tests read."""
    for name, build in MODELS.items():
        if (folder := _unfilled(cache, name)) is not None:
            torch.manual_seed(0)
            build().save_pretrained(folder)
            tokenizer().save_pretrained(folder)
            _name_revision(folder, "main")
    if (folder := _unfilled(cache, ADAPTER)) is not None:
        LoraConfig(base_model_name_or_path="peft-internal-testing/opt-125m").save_pretrained(folder)
        _name_revision(folder, "test")


def _unfilled(cache: Path, name: str) -> Path | None:
    """Where the files of a repository go; None where they are."""
    repository = cache / ("models--" + name.replace("/", "--"))
    return None if (repository / "refs").exists() else repository / "snapshots" / REVISION


def _name_revision(folder: Path, name: str) -> None:
    references = folder.parents[1] / "refs"
    references.mkdir()
    (references / name).write_text(REVISION)
