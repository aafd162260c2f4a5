"""The scheduler's side: it decides how much memory an engine holds and which granules it gives up."""
