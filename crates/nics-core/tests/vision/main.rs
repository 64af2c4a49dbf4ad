//! Models that see, and what they see: against transformers on the tiny checkpoints of `datasets/golden/vision`, against the
//! recorded cases of `tests/golden/vision`, and on input that is wrong. `NICS_GOLDEN` names another folder for either.

mod kit;
mod parity;
mod pictures;
mod recorded;
mod seams;
mod wrong;
