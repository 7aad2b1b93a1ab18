"""The method's own terms: what may be asked of it, by which name. No library is needed to read them."""

METHOD = "S2FT"
"""The method's name among PEFT's types."""

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""PEFT's names of tasks."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj")
"""The canonical names of the projections, in every model family; `out_proj`: the last layer of a mixer that is no attention."""

STRATEGIES = {
    "random": "by the seed",
    "weight": "norm of the weights",
    "activation": "norm of the activations",
    "product": "weight times activation",
    "gradient": "norm of the gradient",
    "lift": "norm of the weights' low-rank part",
    "saliency": "first-order effect on the loss",
}
"""How heads and channels are chosen; how each is computed: `SCORES` in selection/scores.py."""

OWN = "own"
"""The strategy of a config whose channels were chosen by the user's function: `s2ft.select(..., scores=)`."""

DRAWN = ("random", OWN)
"""What a run of `s2ft train` draws by a seed: S²FT's channels, and PaCA's columns, which it names itself."""

TOWERS = ("language", "vision", "audio", "all")
SUBSETS = ("largest", "smallest")
ALLOCATIONS = ("uniform", "global")
DEFAULT_BUDGET = 0.01
PURE = "pure-bf16"  # of the precisions: the deltas too

QUANTISATIONS = {
    "nf4": "4 bits by bitsandbytes, as in QLoRA",
    "fp4": "4 bits by bitsandbytes, as floats",
    "int8": "8 bits by bitsandbytes",
    "torchao-int8": "8 bits by torchao",
    "torchao-float8": "8 bits by torchao, as floats",
    "quanto-int8": "8 bits by optimum-quanto",
    "quanto-int4": "4 bits by optimum-quanto",
}
"""How a base is quantised while it is loaded; by what: `QUANTISATIONS` in runtime/quantisation.py."""
