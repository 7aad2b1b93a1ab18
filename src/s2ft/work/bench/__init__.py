"""Benchmarks: one module per question, each with its floor, its settings and the machine it ran on."""
