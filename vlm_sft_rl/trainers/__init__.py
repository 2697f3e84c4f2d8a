"""Trainers: one file each, a TRL trainer and its config, beside the losses and checks they share."""
