"""A run before it starts: `salient-ds check`."""
