"""The only folder that reads or replaces what DeepSpeed does not document; contract.py lists all of it."""
