"""The live PEFT model: several adapters that are loaded, combined, switched and pooled.

model      `S2FTModel`: the PEFT tuner
loaders    PEFT's and transformers' loaders, guarded
rollback   all or nothing: what failed leaves a model as it was
weighted   `add_weighted_adapter` on a live model
switching  `switch` between the adapters of a live model
pool       more adapters than fit: device, host and disk
"""
