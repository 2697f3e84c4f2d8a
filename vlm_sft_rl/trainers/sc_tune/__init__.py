"""SC-Tune (arXiv 2403.13263): describer and locator teach each other in a closed loop."""
