"""The five stages as plain Python, the recipe, the artifact store and the `xtuner` command."""
