"""Code that the benchmarks share. Scripts import it as ``common``, since Python puts a script's folder on its path."""
