"""The live display `kvctl kvtop`."""

from __future__ import annotations
