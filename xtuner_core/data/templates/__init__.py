"""Chat templates as data: one module each with JINJA, STOP and `render(conversation)`; a module is found by its name."""

OWN = "own"
"""The name that means the model's own Jinja template."""
