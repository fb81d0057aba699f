"""Input formats: one module each with `parse(value) -> Conversation`; a module is found by its name."""
