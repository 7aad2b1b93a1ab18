"""What every folder needs: errors, whole files, locks.

errors   clear errors
extras   libraries that only some commands need
reading  files that others wrote, read within bounds
outputs  can a result be written where it is wanted?
files    files that are whole or not there
locks    one writer at a time
"""
