"""The transformer: layers, initial values, loss, cost, generation. Knows nothing about devices, ranks, data or training."""
