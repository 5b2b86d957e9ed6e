"""Instruction data: reading and validating files, templates, tokenisation, packing, batches, step sampler."""
