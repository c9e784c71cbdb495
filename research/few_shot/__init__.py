"""Few-shot classification on a small CLIP that is pre-trained on drawings."""
