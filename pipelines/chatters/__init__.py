"""How a model is served for chat: one module each with `serve(...)`; a module is found by its name."""
