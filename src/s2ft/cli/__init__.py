"""The command line: one file for each command, which imports slow libraries only when it runs.

app              `s2ft`: its commands
leaving          how errors are reported, and the process ends
options          options that several commands share, or that are declared elsewhere
train            `s2ft train`
data             `s2ft data`
plan             `s2ft plan`
quickstart       `s2ft quickstart`
quickstart_real  `s2ft quickstart-real`
base             `s2ft base`
env              `s2ft env`
config_schema    `s2ft config-schema`
serve            `s2ft serve`
compare          `s2ft compare`
eval             `s2ft eval`
reproduce        `s2ft reproduce`
inspect          `s2ft inspect`
fuse             `s2ft fuse`
merge            `s2ft merge`
export           `s2ft export`
bench            `s2ft bench`
study            `s2ft study`
importing        slow libraries, imported a little faster
tables           tables that are not cut off in a narrow terminal
progress         bars, log lines, and less noise from the libraries
"""
