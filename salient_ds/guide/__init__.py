"""The run file explained: JSON schema, options page, and ``salient-ds init``."""
