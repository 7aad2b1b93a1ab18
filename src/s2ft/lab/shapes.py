"""Shapes of the models that are measured and reproduced: arguments of LlamaConfig."""

SMALL = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12, "vocab_size": 2048,
}  # fmt: skip
LLAMA2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA3_8B = {
    **LLAMA2_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
MISTRAL_7B = {**LLAMA3_8B, "vocab_size": 32000, "max_position_embeddings": 32768}
