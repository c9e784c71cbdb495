"""Adapters from a sentence and a few pairs, on natural tasks, through a running server."""
