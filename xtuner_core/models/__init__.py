"""Model classes come from transformers; here are the seams: loading, attention, presets."""
