"""The ledger's words for ranks on another node: one link for each node."""
