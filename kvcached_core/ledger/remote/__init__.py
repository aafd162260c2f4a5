"""Ranks on other nodes: a link from the scheduler to an agent on each node."""
