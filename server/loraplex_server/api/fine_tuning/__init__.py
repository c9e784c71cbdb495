"""OpenAI's fine-tuning jobs: their store and their runner."""
