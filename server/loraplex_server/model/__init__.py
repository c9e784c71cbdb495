"""Base models: loading, geometry, and what the engine replaces on the instance."""
