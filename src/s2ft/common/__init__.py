"""What every folder needs: errors, safe file access, locks.

errors   `S2FTError`, which lists every problem at once
extras   libraries that only some commands need
reading  untrusted files, read within limits
outputs  checks that a result can be written to its place
files    writes files completely or not at all
locks    one writer at a time
"""
