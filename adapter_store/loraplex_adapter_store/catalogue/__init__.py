"""A catalogue of adapters for many servers, in an object store. See docs/catalogue.md."""
