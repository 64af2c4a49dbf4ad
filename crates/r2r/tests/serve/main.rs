//! The server over two tiny random models.

#![cfg(feature = "serve")]

mod client;
mod kit;
mod refusals;
mod replies;
