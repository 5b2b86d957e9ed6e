"""Evaluation: MT-Bench, tasks and speed. Installed as the package ``salient_eval``."""
