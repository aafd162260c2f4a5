"""Owners of one device on a simulated clock: real governors, desks, accounts and pools, and no engine."""
