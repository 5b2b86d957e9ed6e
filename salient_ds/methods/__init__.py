"""Rank-allocation methods, one folder each, and what they share."""
