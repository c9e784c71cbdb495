"""Text encoders: a trunk beside the decoder, whose rows see all tokens of their text."""
