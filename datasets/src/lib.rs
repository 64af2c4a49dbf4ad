//! Loaders of public benchmarks and generators of the synthetic tasks behind the nano checkpoints.
