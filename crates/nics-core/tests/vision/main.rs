//! Models that see, and what they see: against transformers on the tiny checkpoints of `datasets/golden/vision` (or of the
//! folder that `NICS_GOLDEN` names), against the recorded cases of `tests/golden/vision`, and on input that is wrong.

mod kit;
mod parity;
mod pictures;
mod recorded;
mod seams;
mod wrong;
