"""What a run tells: a summary for programs, a table for the terminal, artifacts and events in Prefect."""
