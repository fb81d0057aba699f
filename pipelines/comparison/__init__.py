"""Tuned model against base and production: differences with their intervals, the gate, and how they are told."""
