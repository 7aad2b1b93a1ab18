"""Evaluation: tasks, answers, scores (docs/evaluation.md)."""
