"""IncreLoRA."""
