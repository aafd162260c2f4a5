"""Two servers of a real model on one budget, and KV memory moving between them: `make demo`."""
