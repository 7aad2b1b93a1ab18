"""The exit codes of `s2ft` besides 0."""

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell would say
