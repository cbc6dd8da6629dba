"""The method, without a scheduler: mixing, losses, the loop of one segment, the store, and the embedded testbed.

Legend of shapes, in tensor names and docstrings: P prompts, G rollouts a group, B = P·G rows, T tokens of a
completion, L tokens of a prompt, N tokens of a flat chunk, H hidden size, V vocabulary.
"""
