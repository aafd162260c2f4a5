"""The worker's side: it owns the physical memory of one rank and carries out plans."""
