"""Adapters as files: read, compared, fused, merged, without a live model.

file           adapter files, read and checked without a base
fusion         `fuse`: several adapters become one
blending       how their deltas are added up: sum, TIES, DARE
overlap        the channels that adapters share, and the interference to expect
inspection     what an adapter changes, as a table and a picture
compatibility  checks that an adapter fits a model and its base
checkpoint     a base model on disk, one tensor at a time
architecture   what transformers makes of it without its weights
stored         where channels lie in a checkpoint's tensors
merge          `merge`: a merged checkpoint, shard by shard
answer_end     the token that ends an answer, in a merged model's generation config
"""
