//! Calibrations of random decoders: going on after a stop, memory, what is refused, and what must hold of the result.

mod kit;
mod limit;
mod methods;
mod properties;
mod refusals;
mod resume;
mod statistics;
