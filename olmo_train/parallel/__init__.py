"""Everything about processes and devices: the world, sharding, recomputation, gradients, kernels."""
