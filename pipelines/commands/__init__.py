"""Groups of `xtuner` commands, one file each; `pipelines/cli.py` joins them. Like it, they import what they need when they run."""
