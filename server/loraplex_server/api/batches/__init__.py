"""Files and batches: their store, and the runner that answers their lines."""
