"""Adapters for engines that people serve with.

export       `export`: adapters for other engines
lora         a slice as an exact LoRA; what vLLM and SGLang need
gguf         llama.cpp's adapter file
patch        the changed entries of a checkpoint
vllm_plugin  vLLM finds native adapters by name
"""
