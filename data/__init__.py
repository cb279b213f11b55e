"""Data sets on disk, the order they are read in, and the training target made from them."""
