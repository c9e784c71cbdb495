"""Training of the shipped generators, and what they reach on the synthetic tasks."""
