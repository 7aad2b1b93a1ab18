"""Training at the frozen model's speed: the model laid out so that each slice lies in its base weight, side by side.

in_place   `in_place`: the layout for training at full speed
ordering   the order in which chosen heads and channels lie side by side
obstacles  what keeps a structure from being permuted
probe      does it compute the same in its new order?
lean       activations that save the least
depth      backward stops at the lowest trained block
rounding   training in bf16 alone
"""
