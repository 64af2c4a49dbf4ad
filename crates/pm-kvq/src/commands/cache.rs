//! The flags that say how keys and values are kept.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use nics_core::cli::Size;
use pm_kvq::Bits;
use pm_kvq::baselines::Baseline;
use pm_kvq::cache::CacheConfig;
use pm_kvq::calibrate::artefact::Widths;

/// Settings that are known by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Preset {
    /// The paper's rules: whole layers are halved, scales and zeros are not counted
    Official,
    /// Page by page, all bytes counted, the most recent tokens exact
    #[default]
    Tuned,
}

impl Preset {
    pub fn config(self) -> CacheConfig {
        match self {
            Self::Official => CacheConfig::official(),
            Self::Tuned => CacheConfig::default(),
        }
    }
}

/// A way to keep keys and values.
#[derive(Debug, Clone, PartialEq)]
pub enum Kv {
    /// As they are.
    Dense,
    /// What the method is compared with.
    Baseline(Baseline),
    /// The method.
    Paged(Box<CacheConfig>),
}

impl FromStr for Kv {
    type Err = String;

    /// `dense`, a baseline's name, or the method's settings, with or without `pm-kvq:` in front.
    fn from_str(text: &str) -> Result<Self, String> {
        let settings = match text.strip_prefix("pm-kvq") {
            Some("") => Some(""),
            Some(rest) => rest.strip_prefix(':'),
            None => None,
        };
        if text == "dense" {
            return Ok(Self::Dense);
        }
        if settings.is_none()
            && let Ok(baseline) = text.parse()
        {
            return Ok(Self::Baseline(baseline));
        }
        // `rtn-4:group=64` is of a baseline, `window=64` is not.
        let looks_like = text.contains('=') && !text.split('=').next().is_some_and(|name| name.contains(':'));
        let is_toml = Path::new(text).extension().is_some_and(|e| e.eq_ignore_ascii_case("toml"));
        if settings.is_none() && !looks_like && !is_toml {
            let refused = text.parse::<Baseline>().err().map(|e| e.to_string()).unwrap_or_default();
            return Err(format!(
                "{refused}; or dense, or settings of pm-kvq, e.g. budget=64MiB,min-bits=2 or a .toml file"
            ));
        }
        let config = settings.unwrap_or(text).parse::<CacheConfig>().map_err(|e| e.to_string())?;
        Ok(Self::Paged(Box::new(config)))
    }
}

/// `--preset` and what may be changed about one, or `--kv`.
#[derive(Debug, Clone, Args)]
pub struct CacheArgs {
    /// Cache: dense, a baseline such as kivi-4, or settings of pm-kvq such as preset=official,max-len=32768,min-bits=4 or
    /// a .toml file
    #[arg(long, value_name = "SPEC", conflicts_with = "preset")]
    pub kv: Option<Kv>,
    /// Settings of pm-kvq that are known by name
    #[arg(long, value_enum, value_name = "NAME")]
    pub preset: Option<Preset>,
    /// Memory of a sequence, which its layers share; without any budget nothing is quantized
    #[arg(long, value_name = "SIZE")]
    pub budget: Option<Size>,
    /// Tokens for which a sequence gets memory at its lowest widths, in place of --budget
    #[arg(long, value_name = "TOKENS", value_parser = nics_core::cli::at_least_one, conflicts_with = "budget")]
    pub max_len: Option<usize>,
    /// Lowest widths in bits: one, or one for each layer, joined by commas
    #[arg(long, value_name = "BITS", value_delimiter = ',', value_parser = bits)]
    pub min_bits: Vec<Bits>,
    /// Widths and budgets of `pm-kvq allocate`, in place of --budget, --max-len and --min-bits
    #[arg(long, value_name = "FILE", conflicts_with_all = ["budget", "max_len", "min_bits"])]
    pub budgets: Option<PathBuf>,
}

impl CacheArgs {
    /// What the flags ask for, files aside.
    ///
    /// # Errors
    /// Flags of the method beside another cache.
    pub fn kv(&self) -> Result<Kv> {
        let kv = match &self.kv {
            Some(kv) => kv.clone(),
            None => Kv::Paged(Box::new(self.preset.unwrap_or_default().config())),
        };
        let flags = [
            ("--budget", self.budget.is_some()),
            ("--max-len", self.max_len.is_some()),
            ("--min-bits", !self.min_bits.is_empty()),
            ("--budgets", self.budgets.is_some()),
        ];
        let given = flags.iter().find(|(_, given)| *given);
        match (kv, given) {
            (Kv::Paged(mut config), _) => {
                if let Some(Size(bytes)) = self.budget {
                    (config.budget, config.max_len) = (Some(bytes as u64), None);
                    config.budgets.clear();
                }
                if let Some(tokens) = self.max_len {
                    (config.max_len, config.budget) = (Some(tokens), None);
                    config.budgets.clear();
                }
                if !self.min_bits.is_empty() {
                    config.min_bits.clone_from(&self.min_bits);
                }
                Ok(Kv::Paged(config))
            }
            (kv, None) => Ok(kv),
            (_, Some((flag, _))) => bail!("{flag} is a setting of pm-kvq: the cache of --kv has none"),
        }
    }
}

/// Settings with the widths of an allocation: each layer gets what `max_len` tokens take at its width, as `budget_mode` of
/// the settings counts.
pub fn with_widths(config: &mut CacheConfig, widths: &Widths) {
    config.min_bits.clone_from(&widths.allocation.widths);
    config.budgets.clear();
    (config.budget, config.max_len) = (None, Some(widths.max_len));
}

pub fn bits(text: &str) -> Result<Bits, String> {
    let found = text.trim().parse::<u32>().ok().and_then(|bits| Bits::try_from(bits).ok());
    found.ok_or_else(|| format!("{text:?} is no width: expected 2, 4, 8 or 16"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_are_told_apart() {
        assert_eq!("dense".parse(), Ok(Kv::Dense));
        assert!(matches!("rtn-4:group=64".parse(), Ok(Kv::Baseline(_))));
        assert!(matches!("q4_0+rotation".parse(), Ok(Kv::Baseline(_))));
        for words in ["pm-kvq", "pm-kvq:window=64", "window=64", "pm-kvq:preset=official,max-len=99"] {
            assert!(matches!(words.parse(), Ok(Kv::Paged(_))), "{words}");
        }
        let e = "kivi".parse::<Kv>().unwrap_err();
        assert!(e.contains("kivi-4") && e.contains("dense") && e.contains("budget=64MiB"), "{e}");
        let e = "pm-kvq:depth=2".parse::<Kv>().unwrap_err();
        assert!(e.contains("`depth` is no setting"), "{e}");
        let e = "rtn-4:window=64".parse::<Kv>().unwrap_err();
        assert!(e.contains("[group]"), "{e}");
    }
}
