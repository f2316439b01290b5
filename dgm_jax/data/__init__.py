"""Data sets: where they come from, in which order they are seen, how they become batches."""
