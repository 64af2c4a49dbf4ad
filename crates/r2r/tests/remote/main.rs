//! The large model on a server: each protocol spoken by a server in this process that misbehaves on demand, and this
//! project's own server. Whatever goes wrong, no token is lost or doubled, and what is written is what the same model writes
//! in this process.

mod faults;
mod greeting;
mod kit;
mod mock;
#[cfg(feature = "serve")]
mod own_server;
mod steps;
mod waiting;
