"""From a recipe to a trainer, one module a method: where data, models, trainers and decoding meet."""
