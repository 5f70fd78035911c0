"""Graphs in fewer bits, and what is measured for them."""
