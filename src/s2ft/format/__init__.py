"""What an adapter is: its config, its channels, its tensors, and how they are known again.

terms         the method's own words: projections, strategies
config        `S2FTConfig`: how much, which, where
unknown       keywords that it does not know, and LoRA's
slices        the chosen channels of one layer, and how they are written
digest        was an adapter made for this base?
sketch        64 numbers by which weights are known again after they were quantised
checksum      are its tensors the ones that were saved?
names         the names of the tensors in an adapter's file
config_file   the config as it lies in a folder: method, format version, kinds of values
weight_file   the weight file, opened
validation    the one check of an adapter's files, for every reader
registration  S²FT as a member of PEFT's enum
"""
