"""Runners of stage ops: what must run a model over data before rows can be merged."""
