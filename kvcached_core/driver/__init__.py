"""Drivers: the verbs by which a device's memory is reserved, created and mapped."""
