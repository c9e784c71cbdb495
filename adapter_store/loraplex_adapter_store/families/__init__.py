"""One file per way an adapter can be trained: its formula, its file format, its fold."""
