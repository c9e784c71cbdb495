"""What /metrics shows: counted here, rendered by a collector of our own."""
