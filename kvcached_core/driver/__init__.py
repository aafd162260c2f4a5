"""Drivers: they reserve, create and map a device's memory."""
