"""Request → adapter."""
