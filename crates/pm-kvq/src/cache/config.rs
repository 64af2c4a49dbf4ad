//! The settings of a [`super::PagedCache`], as a value, as TOML and as words of a command line.

use std::path::Path;
use std::str::FromStr;

use nics_base::settings;
use nics_base::size::Size;
use nics_core::models::ModelDims;
use serde::{Deserialize, Serialize};
use tch::Kind;

use super::store::Layout;
use crate::ledger::{Count, Rules, Shape, Shrink, WindowMode};
use crate::quantize::default_group;
use crate::shrink::Shift;
use crate::{Bits, Error, Result, budget};

/// What happens when a layer's budget is full at its lowest width.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exhausted {
    /// The sequence is named in [`exhausted`](nics_core::seam::Attended::exhausted) by the call after which no further
    /// row fits, and ends there. A call that brings more rows than fit is kept whole, over the budget by those rows.
    #[default]
    Stop,
    /// A call whose rows do not fit is an error.
    Error,
    /// The layer goes below its lowest width, down to 2 bits; there it is as [`Stop`](Self::Stop).
    Below,
}

/// How `max-len` becomes a budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BudgetMode {
    /// Sink and window at their fullest are in it ([`budget::exact`]), so that so many tokens do fit.
    #[default]
    Exact,
    /// The reference's ([`budget::official`]), which they are not in: the end comes before `max-len`, or a lower width.
    Official,
}

/// The format of rows that are not quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exact {
    /// The model's own, if it is of half precision, else bfloat16.
    #[default]
    Auto,
    /// bfloat16: the range of float32.
    Bf16,
    /// IEEE half precision: three bits more than bfloat16, values up to 65,504.
    F16,
    /// float32, twice the bytes.
    F32,
}

/// Settings of a cache. Lists have one entry, or one for each layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct CacheConfig {
    /// Tokens at the beginning that stay exact.
    pub sink: usize,
    /// Tokens of a block of the window; a page has as many, up to 128.
    pub window: usize,
    /// When a block leaves the window.
    pub window_mode: WindowMode,
    /// Width at which tokens leave the window, in bits.
    pub init: Bits,
    /// The lowest widths, in bits.
    pub min_bits: Vec<Bits>,
    /// Channels that share a scale; the largest divisor of a head's channels up to 128 when absent.
    pub group: Option<usize>,
    /// Bytes of each layer of a sequence. Takes precedence over `budget` and `max_len`.
    pub budgets: Vec<u64>,
    /// Bytes of a sequence, which the layers share in proportion to their lowest widths. Takes precedence over `max_len`.
    pub budget: Option<u64>,
    /// Tokens for which each layer gets what they take at its lowest width. Without any budget nothing is ever quantized.
    pub max_len: Option<usize>,
    /// How `max_len` becomes a budget.
    pub budget_mode: BudgetMode,
    /// Which bytes the budget is about.
    pub count: Count,
    /// What is halved when it is full.
    pub shrink: Shrink,
    /// How codes are halved.
    pub shift: Shift,
    /// What happens when it is full at the lowest width.
    pub exhausted: Exhausted,
    /// Format of rows that are not quantized.
    pub exact: Exact,
}

impl Default for CacheConfig {
    /// What this crate recommends: page by page, all bytes counted, the most recent tokens exact.
    fn default() -> Self {
        Self {
            sink: 1,
            window: 128,
            window_mode: WindowMode::Sliding,
            init: Bits::B16,
            min_bits: vec![Bits::B2],
            group: None,
            budgets: Vec::new(),
            budget: None,
            max_len: None,
            budget_mode: BudgetMode::Exact,
            count: Count::Total,
            shrink: Shrink::Oldest,
            shift: Shift::Equivalent,
            exhausted: Exhausted::Stop,
            exact: Exact::Auto,
        }
    }
}

impl CacheConfig {
    /// The paper's rules: whole layers are halved, scales and zeros are not counted, the window is a block that empties.
    pub fn official() -> Self {
        Self {
            window_mode: WindowMode::Block,
            budget_mode: BudgetMode::Official,
            count: Count::Payload,
            shrink: Shrink::Layer,
            exhausted: Exhausted::Below,
            ..Self::default()
        }
    }

    /// Settings from a TOML file.
    ///
    /// # Errors
    /// A file that cannot be read, or that has unknown settings or wrong values.
    pub fn from_toml(path: &Path) -> Result<Self> {
        Ok(settings::read(path, settings::parse)?)
    }

    /// How rows are laid out for a model, and the rules of each layer.
    ///
    /// # Errors
    /// Lists of another length than the model has layers, and what [`Rules::check`] refuses.
    pub(super) fn resolve(&self, dims: &ModelDims) -> Result<(Layout, Vec<Rules>)> {
        let exact = match (self.exact, dims.kind) {
            (Exact::F16, _) | (Exact::Auto, Kind::Half) => nics_kernels::Kind::F16,
            (Exact::F32, _) => nics_kernels::Kind::F32,
            (Exact::Bf16 | Exact::Auto, _) => nics_kernels::Kind::Bf16,
        };
        let shape = Shape {
            kv_heads: dims.kv_heads as usize,
            head_dim: dims.head_dim as usize,
            group: self.group.unwrap_or(default_group(dims.head_dim) as usize),
            exact: exact.size(),
        };
        let floors = each_layer("min-bits", &self.min_bits, dims.layers)?;
        let mut rules: Vec<Rules> = floors
            .iter()
            .map(|floor| Rules {
                shape,
                sink: self.sink,
                window: self.window,
                mode: self.window_mode,
                init: self.init,
                floor: *floor,
                shrink: self.shrink,
                budget: None,
                count: self.count,
            })
            .collect();
        // Before anything is computed from them.
        rules.iter().try_for_each(Rules::check)?;
        if !self.budgets.is_empty() {
            let budgets = each_layer("budgets", &self.budgets, dims.layers)?;
            rules.iter_mut().zip(budgets).for_each(|(rules, budget)| rules.budget = Some(budget));
        } else if let Some(all) = self.budget {
            let widths: u64 = floors.iter().map(|b| u64::from(b.get())).sum();
            for rules in &mut rules {
                let part = u128::from(all) * u128::from(rules.floor.get()) / u128::from(widths.max(1));
                rules.budget = Some(part as u64);
            }
        } else if let Some(tokens) = self.max_len {
            for rules in &mut rules {
                rules.budget = Some(match self.budget_mode {
                    BudgetMode::Exact => budget::exact(rules, rules.floor, tokens).max(rules.least_budget()),
                    BudgetMode::Official => {
                        budget::official(rules.floor, shape.kv_heads, shape.head_dim, tokens)
                    }
                });
            }
        }
        if self.exhausted == Exhausted::Below {
            for rules in &mut rules {
                rules.floor = Bits::B2;
            }
        }
        rules.iter().try_for_each(Rules::check)?;
        let page = rules.first().map_or(1, Rules::page);
        Ok((Layout { shape, sink: self.sink, page, exact, shift: self.shift }, rules))
    }

    /// The rules of each layer of a model, for a plan.
    ///
    /// # Errors
    /// Settings that do not fit the model.
    pub fn rules(&self, dims: &ModelDims) -> Result<Vec<Rules>> {
        Ok(self.resolve(dims)?.1)
    }
}

fn each_layer<T: Copy>(field: &str, list: &[T], layers: usize) -> Result<Vec<T>> {
    match list {
        [one] => Ok(vec![*one; layers]),
        many if many.len() == layers => Ok(many.to_vec()),
        many => Err(Error::Setting {
            field: field.into(),
            found: format!("a list of {}", many.len()),
            expected: format!("one value, or one for each of the model's {layers} layers"),
        }),
    }
}

/// The words of a command line: `preset=official,budget=64MiB,min-bits=2`, or the path of a TOML file. Words are a field's
/// name and its value, lists joined by `/`; `preset=official` or `preset=tuned` comes first.
impl FromStr for CacheConfig {
    type Err = Error;

    fn from_str(words: &str) -> Result<Self> {
        let words = words.trim();
        if Path::new(words).extension().is_some_and(|e| e.eq_ignore_ascii_case("toml")) {
            return Self::from_toml(Path::new(words));
        }
        let mut config = Self::default();
        for (i, word) in words.split(',').map(str::trim).filter(|w| !w.is_empty()).enumerate() {
            let (name, value) = word.split_once('=').ok_or_else(|| {
                Error::Input(format!(
                    "`{word}` is no setting: expected NAME=VALUE, e.g. budget=64MiB, or a .toml file"
                ))
            })?;
            let (name, value) = (name.trim(), value.trim());
            match name {
                "preset" if i > 0 => {
                    return Err(wrong(name, value, "the first setting, since it replaces all others"));
                }
                "preset" => {
                    config = match value {
                        "official" => Self::official(),
                        "tuned" => Self::default(),
                        _ => return Err(wrong(name, value, "official or tuned")),
                    }
                }
                "sink" => config.sink = number(name, value)?,
                "window" => config.window = number(name, value)?,
                "window-mode" => config.window_mode = word_of(name, value, "block or sliding")?,
                "init" => config.init = bits(name, value)?,
                "min-bits" => {
                    config.min_bits = value.split('/').map(|v| bits(name, v)).collect::<Result<_>>()?;
                }
                "group" => config.group = Some(number(name, value)?),
                "budgets" => {
                    config.budgets = value.split('/').map(|v| memory(name, v)).collect::<Result<_>>()?;
                }
                "budget" => config.budget = Some(memory(name, value)?),
                "max-len" => config.max_len = Some(number(name, value)?),
                "budget-mode" => config.budget_mode = word_of(name, value, "exact or official")?,
                "count" => config.count = word_of(name, value, "payload or total")?,
                "shrink" => config.shrink = word_of(name, value, "layer, oldest or newest")?,
                "shift" => config.shift = word_of(name, value, "equivalent, direct or modified")?,
                "exhausted" => config.exhausted = word_of(name, value, "stop, error or below")?,
                "exact" => config.exact = word_of(name, value, "auto, bf16, f16 or f32")?,
                _ => {
                    return Err(Error::Input(format!(
                        "`{name}` is no setting; known are preset, sink, window, window-mode, init, min-bits, group, \
                         budgets, budget, max-len, budget-mode, count, shrink, shift, exhausted and exact"
                    )));
                }
            }
        }
        Ok(config)
    }
}

fn wrong(name: &str, value: &str, expected: &str) -> Error {
    Error::Setting { field: name.into(), found: format!("`{value}`"), expected: expected.into() }
}

fn number(name: &str, value: &str) -> Result<usize> {
    value.parse().map_err(|_| wrong(name, value, "a whole number"))
}

fn bits(name: &str, value: &str) -> Result<Bits> {
    let bits = value.trim().parse::<u32>().ok().and_then(|b| Bits::try_from(b).ok());
    bits.ok_or_else(|| wrong(name, value, "2, 4, 8 or 16"))
}

fn memory(name: &str, value: &str) -> Result<u64> {
    let size: Size =
        value.trim().parse().map_err(|_| wrong(name, value, "an amount of memory, e.g. 64MiB"))?;
    Ok(size.0 as u64)
}

/// One of an enum's words.
fn word_of<T: serde::de::DeserializeOwned>(name: &str, value: &str, expected: &str) -> Result<T> {
    serde_json::from_value(value.into()).map_err(|_| wrong(name, value, expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_toml_say_the_same() {
        let words: CacheConfig =
            "preset=official, budget=64MiB,min-bits=2/4,window=32,shrink=newest,exact=f16,group=64"
                .parse()
                .unwrap();
        let toml = settings::text(&words).unwrap();
        assert_eq!(settings::parse::<CacheConfig>(&toml).unwrap(), words);
        assert_eq!(words.budget, Some(64 << 20));
        assert_eq!(words.min_bits, [Bits::B2, Bits::B4]);
        assert_eq!("".parse::<CacheConfig>().unwrap(), CacheConfig::default());
    }

    #[test]
    fn wrong_words_name_what_is_expected() {
        let refused = |words: &str| words.parse::<CacheConfig>().unwrap_err().to_string();
        assert!(refused("bits=3").contains("known are"));
        assert!(refused("min-bits=3").contains("2, 4, 8 or 16"));
        assert!(refused("budget=lots").contains("64MiB"));
        assert!(refused("window").contains("NAME=VALUE"));
        assert!(refused("shrink=all").contains("oldest"));
        assert!(refused("sink=1,preset=tuned").contains("first"));
        assert!(refused("/nowhere/there.toml").contains("there.toml"));
    }
}
