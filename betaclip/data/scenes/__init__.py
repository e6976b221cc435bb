"""Rendered scenes: pictures of a few things, with a caption, sentences and phrases with boxes."""
