"""Run files for the tables of the papers: a base for each family of models, and tables of what differs."""
