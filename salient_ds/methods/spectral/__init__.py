"""Spectral: plain factors, cut once by their singular values."""
