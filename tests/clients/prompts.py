"""Prompts of routes that take text as it is. Nothing of ours or of a client is imported here."""

HELLO = "<|im_start|>user\nHello, who are you?<|im_end|>\n<|im_start|>assistant\n"
