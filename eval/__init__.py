"""Evaluation: MT-Bench, planted ranks and speed. Installed as the package ``salient_eval``."""
