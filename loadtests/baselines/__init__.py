"""Other servers under the same load, and PEFT as the judge of all outputs."""
