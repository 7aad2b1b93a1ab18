"""Adapters in the forms that serving engines read.

Read `targets`, then `export`.

targets        the registry: what there is to export to
export         `export`: adapters for other engines
lora           a slice as an exact LoRA, in PEFT's format
vllm           a LoRA within the limits of vLLM
sglang         what SGLang needs
gguf           llama.cpp's adapter file
patch          the changed entries of a checkpoint
vllm_plugin    vLLM finds native adapters by name
sync           an adapter into the weights of a running vLLM, and out again
vllm_weights   the other end of it, inside vLLM
sync_callback  a trainer that keeps a vLLM at the weights that it trains
"""
