"""What protects a run: non-finite steps, spikes, rewinds, replica checks, the watchdog and stop signals."""
