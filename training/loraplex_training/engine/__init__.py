"""The training engine: many adapters learn in one batch over one frozen base."""
