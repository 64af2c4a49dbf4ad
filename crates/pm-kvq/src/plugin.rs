//! The method under a name: `--kv pm-kvq:SETTINGS`.

use std::path::Path;

use nics_core::models::ModelDims;
use nics_core::seam::{KvCache, Plugin};

use crate::cache::{CacheConfig, PagedCache};
use crate::calibrate::Scaled;
use crate::calibrate::artefact::read_scales_of_any;

/// `--kv pm-kvq:SETTINGS`, e.g. `pm-kvq:budget=64MiB,min-bits=2` or `pm-kvq:cache.toml`; a [`PagedCache`].
///
/// Settings are those of [`CacheConfig`], as words or as a TOML file. Without a budget nothing is quantized. Beside them,
/// `scales=FILE` names key scales of a calibration: they are applied at run time ([`Scaled`]), which any model takes, also one
/// whose projections are packed.
#[derive(Debug, Clone, Copy, Default)]
pub struct PmKvq;

/// The file of `scales=FILE`, and the other settings.
fn scales_of(spec: &str) -> (Option<&str>, String) {
    let (scales, others): (Vec<&str>, Vec<&str>) =
        spec.split(',').map(str::trim).partition(|word| word.starts_with("scales="));
    (scales.last().and_then(|word| word.strip_prefix("scales=")), others.join(","))
}

impl Plugin for PmKvq {
    fn name(&self) -> &'static str {
        "pm-kvq"
    }

    fn cache(&self, dims: &ModelDims, spec: &str) -> nics_core::Result<Box<dyn KvCache>> {
        let cache = || -> crate::Result<Box<dyn KvCache>> {
            let (scales, settings) = scales_of(spec);
            let cache = Box::new(PagedCache::new(dims, &settings.parse::<CacheConfig>()?)?);
            let Some(file) = scales else { return Ok(cache) };
            Ok(Box::new(Scaled::new(cache, &read_scales_of_any(Path::new(file), dims)?, dims)?))
        };
        cache().map_err(|e| nics_core::Error::Input(format!("--kv pm-kvq:{spec}: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::scales_of;

    #[test]
    fn scales_stand_beside_the_settings() {
        assert_eq!(
            scales_of("window=8, scales=a/b.safetensors,min-bits=4"),
            (Some("a/b.safetensors"), "window=8,min-bits=4".into())
        );
        assert_eq!(scales_of("cache.toml,scales=x"), (Some("x"), "cache.toml".into()));
        assert_eq!(scales_of(""), (None, String::new()));
    }
}
