"""The start of a rank, before its first step: claim memory, wait for it, report what loading takes."""
