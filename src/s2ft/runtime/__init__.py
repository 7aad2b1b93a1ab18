"""The machine and the models on it: precision, processes, failures, timing.

lookup       is there a model of a name, here or on the Hub?
models       base model and tokenizer, from a folder or the Hub
quantisation  how a base is quantised, and what that needs
merging      merging into a quantised base, on files
trainable    whether gradients pass through a quantised model
precision    bf16 or fp32, and why
processes    several processes: which one is first, and how they agree
failures     messages for running out of memory or disk
options      options of a command as a model, which reports every problem at once
environment  versions and machine, for a result
timing       timing on a CPU or GPU
memory       what autograd keeps for backward, and what a process holds
gguf         models in llama.cpp's format
conversion   a GGUF model as a Hugging Face folder
"""
