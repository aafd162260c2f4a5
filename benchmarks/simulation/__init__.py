"""Simulated owners of one device and a simulated clock: real governors, views and pools, but no engines."""
