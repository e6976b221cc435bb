"""Readers of data sets that lie in files."""
