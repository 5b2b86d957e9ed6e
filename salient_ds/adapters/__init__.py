"""Adapter modules: pure torch, no process group in sight."""
