"""What an adapter is: reading, checking, folding, storing, caching."""
