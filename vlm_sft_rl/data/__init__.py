"""Source files -> rows -> collated batches. Rows and tags know nothing of torch."""
