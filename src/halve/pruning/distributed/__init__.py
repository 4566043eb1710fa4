"""One run on several processes: assigned matrices, and output on rank 0."""
