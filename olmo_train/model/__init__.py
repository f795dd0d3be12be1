"""The transformer: layers, first values, loss, cost, generation. Knows nothing about devices, ranks, data or training."""
