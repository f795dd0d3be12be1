"""Everything a run logs: metrics and events files, console, W&B, TensorBoard, profiles."""
