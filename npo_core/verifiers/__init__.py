"""Verifiers: one module a kind, and the processes that they judge in. Nothing here imports torch."""
