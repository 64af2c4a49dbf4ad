//! What every nics crate shares and needs no tensors: artefacts, result rows, reports, shards, hub access, command-line pieces.
