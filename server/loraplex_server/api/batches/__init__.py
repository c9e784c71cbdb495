"""Files and batches: what is kept, and the runner that answers their lines."""
