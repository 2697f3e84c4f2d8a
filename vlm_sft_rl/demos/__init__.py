"""Each method end to end on the pocket world: train, decode, measure, report."""
