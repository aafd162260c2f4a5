"""The ledger file and its folder: layout, mapping, lock, doorbells, runtime directory."""
