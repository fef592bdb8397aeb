"""Ground truth that does not use the package: autograd in float64, and example by example."""
