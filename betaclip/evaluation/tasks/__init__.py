"""The tasks that a model is evaluated on, one file each."""
