"""Self-correction beyond training: building correction rows, and the questions that LLaVA-SCo's authors left open."""
