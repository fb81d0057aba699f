"""How a model is judged: one module each with `evaluate(...)`; a module is found by its name."""
