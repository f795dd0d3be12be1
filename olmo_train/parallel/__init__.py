"""Everything that knows about processes and devices: the world, sharding, recomputation, gradients, kernels."""
