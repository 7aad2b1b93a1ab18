"""One linear layer with trained slices: forward, backward, and what stands in its base weight.

Read `block`, then `linear`; `slot` is the same slice at full speed, `mixed` many of them in one batch.

    linears       what a linear layer is, how its weight lies, where it stands
    block         one adapter's slice of one layer: the delta V and its channels
    backprop      partial back-propagation: the autograd functions
    linear        a linear layer with slices: forward, merge (PEFT's tuner layer)
    base_weight   what stands in a base weight, and the way back
    adapted       what a layer runs: active, merged, switched, disabled
    turns         threads on one live model
    slot          a slice that lives in the base weight
    pack          the slices of many adapters as one table
    mixed         one batch, many adapters: the plan and the products
    mixed_triton  the same products on a GPU, in Triton
    dequantise    the values that a quantised layer computes with
"""
