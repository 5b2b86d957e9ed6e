"""Adapter modules: pure torch, no process groups."""
