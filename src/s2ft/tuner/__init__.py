"""The live PEFT model: adapters are loaded, fused, switched and pooled.

model      `S2FTModel`: the PEFT tuner
loaders    wraps PEFT's and transformers' loaders: a load is checked, and all or nothing
outgoing   what is saved of an adapter, gathered where it is sharded
incoming   checks that what is loaded is the adapter, and nothing else
rollback   undoes a change of a live model that failed half-way
merging    what merging refuses, and the plain model that a quantised one is merged as
mixing     one adapter for each row: `adapter_names`
fusion     `add_weighted_adapter`: fusion on a live model
switching  `switch` between the adapters of a live model
pool       `AdapterPool`: more adapters than fit on the device
unloading  the base's own modules come back
"""
