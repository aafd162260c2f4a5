"""Owners of one device on a simulated clock: real governors, scheduler views and pools, and no engine."""
