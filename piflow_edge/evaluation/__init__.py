"""Comparing students with their teacher: contenders, metrics, features, report."""
