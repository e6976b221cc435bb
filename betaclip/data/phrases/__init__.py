"""Phrases of sentences: two extractors, what they share, and a cache."""
