"""Fine-tuning: lines of training files, their samples, and the loop of steps."""
