"""Pictures with many texts each, from files or rendered, as ragged batches."""
