"""The scheduler's side: how much memory an engine holds, and which granules it gives up."""
