"""Smoke tests: lists of prompts, and what is expected of the answers."""
