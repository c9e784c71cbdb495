"""Tests and measures this repository on a GPU and reports in one page: ``make gpu-report``."""
