"""``salient-ds doctor``: looks at the nodes before a run does, and says which one is wrong."""
