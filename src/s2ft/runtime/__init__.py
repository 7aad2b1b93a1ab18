"""The machine and what runs on it: models, precision, processes, failures, time.

models       base model and tokenizer, from a folder or the Hub
precision    bf16 or fp32, and why
processes    several processes: who leads, and how they agree
failures     out of memory and disk, in words
environment  versions and machine of a result
timing       how long something takes, on the CPU or on a GPU
"""
