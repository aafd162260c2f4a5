"""Who gets how much: shares, grants and reclaims, as arithmetic and as words in the ledger."""
