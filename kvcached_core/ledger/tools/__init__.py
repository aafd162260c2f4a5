"""What kvctl and the metrics use: limits and floors, trim, discard, metric definitions."""
