"""The ledger file: its layout, mapping, lock, doorbells and runtime directory."""
