"""Request → replica."""
