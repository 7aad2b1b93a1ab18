"""The command line: one file for each command, which imports slow libraries only when it runs.

app         `s2ft`: its commands
leaving     how errors are reported, and the process ends
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
options     command-line options from options that other modules declare
tables      tables that are not cut off in a narrow terminal
quiet       fewer messages from the libraries
"""
