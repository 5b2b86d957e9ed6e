"""Everything that only HeteroLoRA uses."""
