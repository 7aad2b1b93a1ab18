"""What an adapter is: its config, its channels, its tensors, and how it is checked.

terms         the method's own words: projections, strategies
choice        how much, which, where: fields that need no library to be checked
saved         an adapter's config as its file has it, without PEFT
config        `S2FTConfig`: the same as one of PEFT's, how much, which, where
unknown       answers to unknown keywords, LoRA's among them
slices        the chosen channels of one layer, and how they are written
digest        recognises the base that an adapter was made for
sketch        64 numbers that recognise weights after quantisation
checksum      checksums of the saved tensors
names         the names of the tensors in an adapter's file
folder        is there an adapter in a folder?
config_file   the config as a file: method, format version, kinds of values
weight_file   opens the weight file
validation    the one check of an adapter's files, for every reader
registration  S²FT as a member of PEFT's enum
"""
