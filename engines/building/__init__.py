"""Engines that are built ahead of time, and the cache that keeps them."""
