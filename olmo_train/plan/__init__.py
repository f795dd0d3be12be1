"""Before launch: memory, time and cost of a run."""
