"""Optimizers, learning-rate schedules."""
