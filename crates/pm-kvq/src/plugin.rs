//! The method under a name: `--kv pm-kvq:SETTINGS`.

use nics_core::models::ModelDims;
use nics_core::seam::{KvCache, Plugin};

use crate::cache::{CacheConfig, PagedCache};

/// `--kv pm-kvq:SETTINGS`, e.g. `pm-kvq:budget=64MiB,min-bits=2` or `pm-kvq:cache.toml`; a [`PagedCache`].
///
/// Settings are those of [`CacheConfig`], as words or as a TOML file. Without a budget nothing is quantized.
#[derive(Debug, Clone, Copy, Default)]
pub struct PmKvq;

impl Plugin for PmKvq {
    fn name(&self) -> &'static str {
        "pm-kvq"
    }

    fn cache(&self, dims: &ModelDims, spec: &str) -> nics_core::Result<Box<dyn KvCache>> {
        let cache = || PagedCache::new(dims, &spec.parse::<CacheConfig>()?);
        let cache = cache().map_err(|e| nics_core::Error::Input(format!("--kv pm-kvq:{spec}: {e}")))?;
        Ok(Box::new(cache))
    }
}
