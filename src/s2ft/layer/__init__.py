"""One linear layer with trained slices: forward, backward, and what stands in its base weight.

Read `block`, then `linear`; then `slot` (training in place) and `mixed` (many adapters in one batch).

    linears       linear layers: which modules are, how their weights are laid out, where they are in a model
    columns       some rows or columns of a matrix: taken, put and added
    block         one adapter's slice of one layer: the delta V and its channels
    backprop      partial back-propagation: the autograd functions
    linear        a linear layer with slices: forward, merge (PEFT's tuner layer)
    stacked       stacked experts, read as linear layers
    experts       stacked experts with slices
    expert_backprop  partial back-propagation through them
    routing       tokens and channels of experts, laid out for grouped products
    grouped       grouped products
    sharding      weights of which each process holds a part
    split         layers of which each process computes a part (tensor parallelism)
    base_weight   adds slices to a base weight, and restores it
    adapted       what a layer runs: active, merged, switched, disabled
    token_rows    rows of an embedding, which are merged where slices are
    turns         the lock by which threads share a live model
    slot          a slice that lives in the base weight
    pack          the slices of many adapters as one table
    mixed         one batch, many adapters: the plan and the products
    mixed_triton  the same products on a GPU, in Triton
    dequantise    the values of a quantised weight
    frozen        a frozen quantised layer, which saves nothing for backward
"""
