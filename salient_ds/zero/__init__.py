"""Everything that knows DeepSpeed: engine, shards, reductions, checkpoints."""
