"""The method's own terms: what may be asked of it, by which name. No library is needed to read them."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The canonical names of the seven projections, in every model family."""

STRATEGIES = ("random", "weight", "activation", "product", "gradient", "lift", "saliency")
SUBSETS = ("largest", "smallest")
ALLOCATIONS = ("uniform", "global")
DEFAULT_BUDGET = 0.01
PURE = "pure-bf16"  # of the precisions: the deltas too
