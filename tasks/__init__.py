"""Prefect tasks, one side effect each. Every task first asks the store's manifests and returns what is committed."""
