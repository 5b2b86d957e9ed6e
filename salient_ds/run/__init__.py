"""One run from files to adapter, and the verbs that start it."""
