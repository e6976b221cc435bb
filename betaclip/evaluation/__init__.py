"""What a model has learnt: retrieval, fine-grained choices, pointing."""
