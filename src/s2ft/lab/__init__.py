"""The laboratory: benchmarks, studies, and the paper's rows run again.

registry   what `s2ft bench` and `s2ft study` offer
bench      what training, switching, mixing and the rest cost
study      the paper's claims at small scale
reproduce  rows of the paper's tables
"""
