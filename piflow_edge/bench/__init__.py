"""Measuring a bundle on this machine."""
