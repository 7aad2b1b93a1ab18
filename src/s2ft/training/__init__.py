"""Training at the frozen model's speed: a layout in which each slice is a contiguous part of its base weight.

in_place   `in_place`: the layout for training at full speed
ordering   permutes heads and channels so that the chosen ones are contiguous
obstacles  reasons why a structure cannot be permuted
plan       which slices can be contiguous, in which order, and why others cannot
dummy      what a model is called with to see what it computes
probe      tests that a permuted structure computes the same
lean       activations that save less for backward
rate       a learning rate for slices
depth      backward stops at the lowest trained block
rounding   stochastic rounding, for training in bf16 alone
"""
