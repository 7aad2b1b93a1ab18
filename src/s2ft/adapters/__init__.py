"""Adapters as files: read, compared, fused, merged, without a live model.

file         adapter files, read and checked without a base
combination  several adapters' deltas in one: sum, TIES, DARE
fusion       `fuse`: adapter folders made one
overlap      where adapters meet, and the interference to expect
inspection   what an adapter changes: rows and picture
checkpoint   a base model on disk, one tensor at a time
merge        a merged checkpoint, shard by shard
fitting      does an adapter fit a model, and its base?
loading      what is loaded into a live model is the adapter, and nothing else
"""
