"""The demo (`make demo`): two servers share one memory budget, and KV memory moves between them."""
