//! The megrez command.
fn main() {}
