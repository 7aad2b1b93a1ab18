"""The command line. Each command is one file; imports of what takes seconds wait until a command needs it.

app         `s2ft` itself
leaving     how a command ends that cannot go on
codes       exit codes
train       `s2ft train`
quickstart  `s2ft quickstart`
eval        `s2ft eval`
reproduce   `s2ft reproduce`
inspect     `s2ft inspect`
fuse        `s2ft fuse`
merge       `s2ft merge`
export      `s2ft export`
bench       `s2ft bench`
study       `s2ft study`
options     options that are declared elsewhere, as commands take them
tables      tables that are shown whole
quiet       less noise from the libraries
"""
