"""Graph -> Graph: one fusion a file, and the pipeline that verifies, counts, times and dumps between them."""
