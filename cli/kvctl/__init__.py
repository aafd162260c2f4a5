"""kvctl: show and control the elastic KV caches of a machine."""

from __future__ import annotations
