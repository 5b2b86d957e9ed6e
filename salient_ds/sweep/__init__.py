"""Tune learning rates and compare arms: many runs, one queue, one page."""
