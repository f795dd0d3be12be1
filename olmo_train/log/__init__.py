"""What a run writes for people: metrics and events files, console, W&B, TensorBoard, profiles."""
