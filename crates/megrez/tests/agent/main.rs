//! The web-search agent: searches against loopback servers, turns with a model whose replies are written here, and the
//! command over the small checkpoints.

#![cfg(feature = "agent")]

mod command;
mod search;
mod turn;
mod web;

#[path = "../support/mod.rs"]
mod support;
