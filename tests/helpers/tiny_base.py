"""A random Llama of 30,000 parameters with a byte tokenizer, for tests that train but need no model that knows anything."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.reasoning_content and loop.last %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def byte_tokenizer(
    chat_template: str | None = None, more: Sequence[str] = (), around: str | None = None
) -> PreTrainedTokenizerFast:
    """One token for each byte, <pad> = 0 and <eos> = 1; special tokens `more` = 258, ...

    `around` is what it makes of every text, such as "<bos> $A <eos>", with special tokens of its own.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1, **{letter: index + 2 for index, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = chat_template
    fast.add_special_tokens({"additional_special_tokens": list(more)})
    if around is not None:
        fast.bos_token = more[0] if more else None
        names = [name for name in around.split() if name != "$A"]
        pairs = [(name, fast.convert_tokens_to_ids(name)) for name in names]
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=pairs)
    return fast


def tiny_model(vocabulary: int = 258) -> LlamaForCausalLM:
    """The same random weights on every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            tie_word_embeddings=True,
        )
    )


def save_tiny_base(folder: Path, chat_template: str | None = None, more: Sequence[str] = ()) -> Path:
    """Writes model and tokenizer to `folder`, as a download from the Hub would."""
    tiny_model(258 + len(more)).save_pretrained(folder)
    byte_tokenizer(chat_template, more).save_pretrained(folder)
    return folder
