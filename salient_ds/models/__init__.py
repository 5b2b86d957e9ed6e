"""Base models: loading, attention, kernels of other libraries."""
