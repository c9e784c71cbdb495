"""Everything that a GPU can tell about this repository, in one page: ``make gpu-report``."""
