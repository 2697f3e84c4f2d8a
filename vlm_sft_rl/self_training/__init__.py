"""Self-training by reflection (R3V, arXiv 2411.00855): sample, grade, build rows, train, evaluate, and again."""
