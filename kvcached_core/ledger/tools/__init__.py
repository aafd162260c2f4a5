"""Functions for kvctl and monitoring: limits, floors and weights, trim, discard, metrics."""
