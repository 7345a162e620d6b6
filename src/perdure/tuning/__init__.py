"""Choosing hyper-parameters on the beginning of a stream: spaces, searches, and trials that survive their workers.

`perdure tune` is the command. What a search may see is decided in `perdure.streams.held_out`, and nothing else is read:
no test data and no later task.
"""
