//! The method as caches of the core's seam.
//!
//! [`PagedCache`] is the one for use, [`OfficialCache`] the reference's two in their own numerics.
//!
//! | file | what is there |
//! |---|---|
//! | `paged.rs` | the cache: sequences, budgets, the seam |
//! | `config.rs` | its settings |
//! | `attend.rs` | attention over pages and new rows |
//! | `store.rs`, `pool.rs` | pages of codes, and the memory that they share |
//! | `positions.rs`, `snapshot.rs` | positions as runs; a layer as tensors |
//! | `official.rs` | the reference's caches |

mod attend;
pub(crate) mod call;
mod config;
pub mod official;
mod paged;
mod pool;
mod positions;
mod snapshot;
mod store;

pub use config::{BudgetMode, CacheConfig, Exact, Exhausted};
pub use official::OfficialCache;
pub use paged::{LayerStats, PagedCache};
