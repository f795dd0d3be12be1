"""Opening and closing a run: what to start from, building the model, what may change on resume, memory."""
