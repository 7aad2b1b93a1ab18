"""A tokenizer like Llama 2's: words begin with "▁", the rest is told byte by byte, and a text loses its first space."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ("▁The", "▁capital", "▁of", "▁France", "▁is", "▁Paris", ".", "▁", "▁▁", "Paris")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """<unk> = 0, <s> = 1, </s> = 2, <0x00> = 3, ..., then words and letters; <s> comes before every text."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, *map(chr, range(97, 123))]
    model = models.BPE(
        vocab={name: place for place, name in enumerate(names)}, merges=[], ignore_merges=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[A-Za-z]+|▁+|."), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
