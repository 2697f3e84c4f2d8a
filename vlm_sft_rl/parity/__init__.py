"""Do training and decoding see the same? Tokens, positions and log-probabilities of every way that a model is run here."""
