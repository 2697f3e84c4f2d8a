"""The pocket world and the pocket VLM: rendered scenes with exact ground truth, and a LLaVA small enough for a CPU.

Used by the demos and the tests; nothing else in the package imports it.
"""
