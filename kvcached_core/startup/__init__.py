"""Everything a rank does before its first step: it claims room, waits its turn and measures what it took."""
