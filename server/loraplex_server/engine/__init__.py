"""The engine: scheduler, KV cache, model runner; one thread owns the device."""
