"""Other servers under the same load, and PEFT as the judge of everybody's outputs."""
