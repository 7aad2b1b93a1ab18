"""Shapes of the models that are measured and reproduced: arguments of LlamaConfig, and of those that `model_type` names."""

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
LLAMA3_70B = {
    **LLAMA3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MISTRAL_7B = {**LLAMA3_8B, "vocab_size": 32000, "max_position_embeddings": 32768}
EXPERTS = {
    "model_type": "qwen3_moe", "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 512,
    "num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 2048,
}  # fmt: skip
QWEN3_30B_A3B_8_BLOCKS = {
    **EXPERTS, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 8,
    "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32, "head_dim": 128, "vocab_size": 151936,
}  # fmt: skip
