"""Tools that use a whole run: bench, replay, doctor."""
