"""Configuration of a run: typed sections, read from YAML."""
