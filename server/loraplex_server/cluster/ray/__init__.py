"""Starting, watching and stopping the Ray processes of a cluster."""
