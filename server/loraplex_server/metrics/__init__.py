"""Counts for /metrics, and the collectors that render them."""
