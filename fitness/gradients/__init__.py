"""Losses whose gradient a search follows: calibration tasks and distillation."""
