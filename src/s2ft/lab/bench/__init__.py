"""`s2ft bench`: what is measured, beside its rival and its floor.

report         what a benchmark returns
training       what a training step costs
contestants    each method, set up for it
saved          what autograd keeps for backward
training_plot  the picture of both
selection      how long choosing channels takes
switch         how long a switch takes, beside LoRA and one copy
fusion         how long fusing two adapters takes, on files
parallel       what many adapters in one batch cost, beside LoRA
evaluation     how fast answers are written, beside plain `generate`
"""
