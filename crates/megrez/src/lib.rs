//! Megrez.
