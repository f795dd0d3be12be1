"""The model's room: what a transformer is and costs. It knows nothing of devices, ranks, data or training."""
