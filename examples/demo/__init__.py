"""A real model under load, and its KV memory moving: `make demo`."""
