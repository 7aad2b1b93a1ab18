"""Adapters as files: read, compared, fused, merged, without a live model.

file           adapter files, read and checked without a base
combination    several adapters' deltas in one: sum, TIES, DARE
fusion         `fuse`: several adapter folders become one
overlap        the channels that adapters share, and the interference to expect
inspection     what an adapter changes, as a table and a picture
compatibility  checks that an adapter fits a model and its base
checkpoint     a base model on disk, one tensor at a time
merge          `merge`: a merged checkpoint, shard by shard
"""
