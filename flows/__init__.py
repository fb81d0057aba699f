"""Prefect, and only Prefect: tasks of a few lines over the stages in `pipelines`."""
