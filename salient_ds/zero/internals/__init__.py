"""The only rooms that read or replace what DeepSpeed does not document; contract.py lists all of it."""
