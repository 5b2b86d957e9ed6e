"""Everything that knows DeepSpeed: its JSON, its start-up, collectives, the sharded base, undocumented internals."""
