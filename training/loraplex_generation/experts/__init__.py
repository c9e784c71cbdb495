"""SG-LoRA and ICM-LoRA over the adapters that a store holds."""
