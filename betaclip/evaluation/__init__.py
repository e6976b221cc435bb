"""Evaluation of a model: retrieval, fine-grained choices, pointing."""
