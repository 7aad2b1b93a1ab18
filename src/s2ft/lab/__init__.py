"""The laboratory: benchmarks, studies, and reproductions of the paper's tables.

registry   what `s2ft bench` and `s2ft study` offer
shapes     shapes of the models that are measured and reproduced
bench      time and memory of training, switching, mixed batches and more
study      the paper's claims at small scale
reproduce  rows of the paper's tables
families   tiny models of every class of transformers
"""
