"""The engine over several processes, each with a part of every layer (tensor parallel)."""
