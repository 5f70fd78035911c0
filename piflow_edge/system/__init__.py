"""Files, caches, hardware, progress: what is not about images."""
