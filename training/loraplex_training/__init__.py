"""Training adapters on chat examples: LoRA through PEFT, resumable, on a CPU if need be."""
