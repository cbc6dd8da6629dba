"""What is written down: the run configuration, Arrow schemas, records and the layout of the store.

This package imports nothing else of the project and touches neither disk nor network.
"""
