"""How training processes are started: one module each with `command(...)`; a module is found by its name."""
