"""The families of adapters that learn on the engine."""
