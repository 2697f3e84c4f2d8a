"""Packed training: rows without padding, and rows about one image that share it, encoded and read once."""
