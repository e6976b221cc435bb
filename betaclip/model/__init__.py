"""The model: two towers of open_clip's, the pooling block between them, texts without padding, and weights."""
