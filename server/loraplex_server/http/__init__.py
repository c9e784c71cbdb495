"""The OpenAI-style HTTP front: validate, resolve, submit, stream."""
