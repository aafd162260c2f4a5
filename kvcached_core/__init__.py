"""Elastic pools of device memory, and the ledger by which engines on a device share it."""

__version__ = "0.1.0"
