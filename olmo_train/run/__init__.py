"""Open and close a run: where to start from, building the model, changes allowed on resume, memory."""
