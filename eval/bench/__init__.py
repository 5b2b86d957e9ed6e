"""Benchmarks: training steps of several methods, single allocation events, and the recovery of planted ranks."""
