"""Trains CLIP to tell classes of images apart, from a few images of each."""
