"""One module for each command of kvctl, or for each family of commands."""

from __future__ import annotations
