//! The shared core of nics over libtorch: checkpoints, tokenizers, model families and the seams that methods plug into.
