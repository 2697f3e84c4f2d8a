"""From plain answers to tagged rows: phrases, negatives by rule or teacher, quality control, balance.

The published description of the pipeline is REVERSE (arXiv 2504.13169), appendix B; its code was not released.
"""
