"""Recipes: ways to train that end as a plain LoRA. A recipe is a file and a row of ``table``."""
