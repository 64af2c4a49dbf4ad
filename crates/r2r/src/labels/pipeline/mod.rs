//! Labels from queries, in five steps over files.
//!
//! ```text
//! queries.jsonl -> respond  -> responses.jsonl                       large model
//!                  prefill  -> features-NNNN.safetensors, index.json small model
//!                  continue -> mismatch.jsonl                        large model
//!                  judge    -> judged.jsonl                          a judge
//!                  build    -> labels-NNNN.safetensors, labels.json  neither
//! ```
//!
//! A folder belongs to one run: `run.json` holds every step's settings and a hash of them and of the steps before, and
//! what other settings made is refused. Files grow by whole groups and a document is never split between two files of
//! rows, so a run killed at any moment goes on and ends with the same bytes: which sequences share a call of a model, on
//! which the last bits of its results depend, follows from the data and the settings alone. What a killed run leaves of a
//! group is made again.
//!
//! Nothing holds the whole data: of each file a line or a group is in memory, of features a file of bounded size. A
//! [`Budget`] turns a limit on memory into sizes of batches and files. Shards (`i/n`: every n-th query) have folders of
//! their own, and [`LabelSet`] reads them together.

mod budget;
mod build;
mod continuation;
mod documents;
mod error;
mod judging;
mod lines;
mod party;
mod prefill;
mod query;
mod respond;
mod set;
mod shards;
mod work;
pub(crate) mod writing;

pub use budget::Budget;
pub use build::build;
pub use continuation::{ContinueSettings, Continued, continue_mismatches};
pub use documents::{ReadDocument, documents};
pub use error::LabelError;
pub use judging::{JudgedLine, judge};
pub use lines::{Lines, Log};
pub use party::{Party, same_tokenizer};
pub use prefill::{Form, PrefillSettings, prefill};
pub use query::{Query, QueryFile, check as check_queries};
pub use respond::{Ending, RespondSettings, Response, respond};
pub use set::{Documents, LabelColumn, LabelSet};
pub use shards::{Index, ShardEntry, ShardFile};
pub use work::{Done, RUN_FILE, Report, Step, StepRecord, Watch, Work};
