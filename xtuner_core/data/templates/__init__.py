"""Chat templates as data: one module each with a `TEMPLATE`; a module is found by its name."""
