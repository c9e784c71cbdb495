"""The sources of adapters: directories, the Hub, object stores, web servers."""
