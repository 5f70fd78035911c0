"""Which networks of a bundle are in memory: all at once, or one in turn."""
