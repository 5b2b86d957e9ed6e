"""One file per rank-allocation method, by composition."""
