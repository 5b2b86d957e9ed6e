"""SalientLoRA."""
