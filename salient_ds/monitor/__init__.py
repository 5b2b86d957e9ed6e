"""Event log, metrics and pictures of a run."""
