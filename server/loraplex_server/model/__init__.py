"""Base models: loading, geometry, and the modules that the engine replaces."""
