//! What is compared: every cache of the study, by the name that results have.

use super::{Basis, Study, Weights};
use crate::Bits;
use crate::cache::{CacheConfig, Exact};
use crate::ledger::{Count, Shrink, WindowMode};
use crate::shrink::Shift;

/// A cache of the study.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    /// The name.
    pub name: String,
    /// The weights that it is used with.
    pub weights: Weights,
    /// What it is.
    pub kind: Kind,
    /// Key scales in front of it.
    pub scales: Option<Basis>,
    /// The tables that it stands in, besides that of everything.
    pub tables: Vec<Table>,
}

/// What a cache is.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// Everything as the model has it, float32.
    Dense,
    /// A baseline by its name.
    Baseline(String),
    /// A cache of pages without a budget: all rows exact, or rounded once when they leave the window.
    Pages(CacheConfig),
    /// The method with the budget of a width: exact sink and window, and that width elsewhere, for a whole text.
    Budget(CacheConfig, Vec<Bits>),
    /// The method with the widths that the sensitivity chooses for a mean of so many bits; or the same in reverse order.
    Allocated {
        /// Settings.
        config: CacheConfig,
        /// Widths to choose from.
        choices: Vec<Bits>,
        /// Bits of all layers together.
        mean: f64,
        /// Whether the layers' widths are exchanged: what the sensitivity advises against.
        reversed: bool,
    },
    /// The method with a budget in true bytes, those that a rival takes.
    Equal {
        /// Settings.
        config: CacheConfig,
        /// The rival.
        rival: Box<Kind>,
        /// Whether its average counts, not its peak.
        average: bool,
    },
}

/// A table of results.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Table {
    /// Caches whose codes take at most so many bits a value outside of sink and window.
    Peak(u32),
    /// The method at the peak of a rival's true bytes, and the rival.
    TruePeak(String),
    /// The method at a rival's time-averaged true bytes, and the rival.
    Average(String),
    /// Ablations of the method.
    Ablation(&'static str),
}

const PLAIN: Weights = Weights::Plain;

/// Builds the list.
struct List<'a> {
    study: &'a Study,
    all: Vec<Variant>,
}

impl List<'_> {
    fn add(&mut self, name: impl Into<String>, weights: Weights, kind: Kind, tables: Vec<Table>) {
        self.all.push(Variant { name: name.into(), weights, kind, scales: None, tables });
    }

    fn scaled(&mut self, name: &str, weights: Weights, kind: &Kind, scales: Basis) {
        self.all.push(Variant {
            name: format!("{name}, scales ({scales})"),
            weights,
            kind: kind.clone(),
            scales: Some(scales),
            tables: vec![Table::Ablation("key scales")],
        });
    }

    /// The method's settings: the paper's rules with this study's sizes.
    fn config(&self, shrink: Shrink, shift: Shift) -> CacheConfig {
        let cache = &self.study.cache;
        CacheConfig {
            sink: cache.sink,
            window: cache.window,
            window_mode: WindowMode::Block,
            group: Some(cache.group),
            count: Count::Payload,
            shrink,
            shift,
            exact: Exact::Bf16,
            ..CacheConfig::default()
        }
    }

    fn layer(&self) -> CacheConfig {
        self.config(Shrink::Layer, Shift::Equivalent)
    }

    fn pages(&self) -> CacheConfig {
        self.config(Shrink::Oldest, Shift::Equivalent)
    }

    /// Rounding to the nearest code when a block leaves the window, sink and window exact as the method's.
    fn rounded(&self, bits: Bits) -> Kind {
        Kind::Pages(CacheConfig { init: bits, min_bits: vec![bits], ..self.layer() })
    }

    fn kivi(&self, bits: Bits) -> Kind {
        let cache = &self.study.cache;
        Kind::Baseline(format!("kivi-{}:tokens={},group={}", bits.get(), cache.window, cache.group))
    }

    fn baseline(&self, name: &str, settings: &str) -> Kind {
        let group = self.study.cache.group;
        Kind::Baseline(format!("{name}:{settings}group={group}"))
    }

    fn rivals(&mut self) {
        self.add("float32", PLAIN, Kind::Dense, vec![]);
        self.add("16 bits", PLAIN, Kind::Pages(self.layer()), vec![]);
        let exact = self.study.cache.sink + self.study.cache.window;
        for bits in [Bits::B8, Bits::B4, Bits::B2] {
            let b = bits.get();
            let rounded = self.rounded(bits);
            let kivi = self.kivi(bits);
            self.add(
                rtn(b),
                PLAIN,
                rounded,
                vec![Table::Peak(b), Table::Average(rtn(b)), Table::TruePeak(rtn(b))],
            );
            self.add(
                kivi_name(b),
                PLAIN,
                kivi,
                vec![Table::Peak(b), Table::Average(kivi_name(b)), Table::TruePeak(kivi_name(b))],
            );
            if bits == Bits::B8 {
                continue;
            }
            let plain = self.baseline(&format!("rtn-{b}"), "");
            self.add(format!("RTN-{b}, no window"), PLAIN, plain, vec![Table::Peak(b)]);
            let mikv = self.baseline(&format!("mikv-{b}"), &format!("hitters={exact},"));
            self.add(format!("MiKV-{b}"), PLAIN, mikv, vec![Table::Peak(b)]);
            let rotate = self.baseline(&format!("rotatekv-{b}"), "");
            self.add(format!("RotateKV-{b}"), PLAIN, rotate, vec![Table::Peak(b)]);
            let quanto =
                self.baseline(&format!("hf-int{b}"), &format!("residual={},", self.study.cache.window));
            self.add(format!("transformers int{b}"), PLAIN, quanto, vec![Table::Peak(b)]);
        }
        for (name, bits) in [("q8_0", 8), ("fp8", 8), ("q4_0", 4), ("q4_0+rotation", 4)] {
            let kind = Kind::Baseline(name.into());
            let mut tables = vec![Table::Peak(bits)];
            if !name.contains('+') && name != "fp8" {
                tables.push(Table::Average(name.into()));
            }
            self.add(name, PLAIN, kind, tables);
        }
    }

    fn method(&mut self) {
        for bits in [Bits::B8, Bits::B4, Bits::B2] {
            let b = bits.get();
            let kind = Kind::Budget(self.layer(), vec![bits]);
            self.add(pm(b), PLAIN, kind, vec![Table::Peak(b), Table::Ablation("shift")]);
            let kind = Kind::Budget(self.pages(), vec![bits]);
            self.add(pm_pages(b), PLAIN, kind, vec![Table::Peak(b)]);
            if bits == Bits::B8 {
                continue;
            }
            let newest = Kind::Budget(self.config(Shrink::Newest, Shift::Equivalent), vec![bits]);
            self.add(format!("{}, pages, newest first", pm(b)), PLAIN, newest, vec![Table::Peak(b)]);
            for (word, shift) in [("direct", Shift::Direct), ("modified", Shift::Modified)] {
                let kind = Kind::Budget(self.config(Shrink::Layer, shift), vec![bits]);
                self.add(format!("{}, {word} shift", pm(b)), PLAIN, kind, vec![Table::Ablation("shift")]);
            }
        }
        for (low, high) in [(Bits::B2, Bits::B4), (Bits::B4, Bits::B8)] {
            let name = format!("PM-KVQ F={}/{}", low.get(), high.get());
            let mean = f64::from(low.get() + high.get()) / 2.0;
            for (word, reversed) in [("allocated", false), ("allocated in reverse", true)] {
                let kind = Kind::Allocated { config: self.layer(), choices: vec![low, high], mean, reversed };
                self.add(
                    format!("{name}, {word}"),
                    PLAIN,
                    kind,
                    vec![Table::Ablation("widths of the layers")],
                );
            }
        }
        for basis in Basis::ALL {
            let kind = Kind::Budget(self.layer(), vec![Bits::B4]);
            self.scaled(&pm(4), PLAIN, &kind, basis);
        }
    }

    fn equals(&mut self) {
        let rivals = [
            (kivi_name(8), self.kivi(Bits::B8)),
            (rtn(8), self.rounded(Bits::B8)),
            (kivi_name(4), self.kivi(Bits::B4)),
            (rtn(4), self.rounded(Bits::B4)),
            (kivi_name(2), self.kivi(Bits::B2)),
            (rtn(2), self.rounded(Bits::B2)),
            ("q8_0".to_owned(), Kind::Baseline("q8_0".into())),
            ("q4_0".to_owned(), Kind::Baseline("q4_0".into())),
        ];
        for (rival, kind) in rivals {
            for (word, config) in [("layers", self.layer()), ("pages", self.pages())] {
                let config = CacheConfig { count: Count::Total, ..config };
                let equal =
                    |average| Kind::Equal { config: config.clone(), rival: Box::new(kind.clone()), average };
                let name = format!("PM-KVQ, {word}, average of {rival}");
                self.add(name, PLAIN, equal(true), vec![Table::Average(rival.clone())]);
                if rival.starts_with("KIVI") && rival != kivi_name(8) {
                    let name = format!("PM-KVQ, {word}, peak of {rival}");
                    self.add(name, PLAIN, equal(false), vec![Table::TruePeak(rival.clone())]);
                }
            }
        }
    }

    fn outliers(&mut self) {
        let weights = Weights::Outliers;
        self.add("float32", weights, Kind::Dense, vec![]);
        self.add(rtn(4), weights, self.rounded(Bits::B4), vec![Table::Peak(4)]);
        self.add(kivi_name(4), weights, self.kivi(Bits::B4), vec![Table::Peak(4)]);
        let rotate = self.baseline("rotatekv-4", "");
        self.add("RotateKV-4", weights, rotate, vec![Table::Peak(4)]);
        for name in ["q4_0", "q4_0+rotation"] {
            self.add(name, weights, Kind::Baseline(name.into()), vec![Table::Peak(4)]);
        }
        let layer = Kind::Budget(self.layer(), vec![Bits::B4]);
        let pages = Kind::Budget(self.pages(), vec![Bits::B4]);
        let allocated = Kind::Allocated {
            config: self.layer(),
            choices: vec![Bits::B4, Bits::B8],
            mean: 6.0,
            reversed: false,
        };
        let (by_page, by_layer) = (pm_pages(4), "PM-KVQ F=4/8, allocated");
        self.add(pm(4), weights, layer.clone(), vec![Table::Peak(4), Table::Ablation("key scales")]);
        self.add(&*by_page, weights, pages.clone(), vec![Table::Peak(4), Table::Ablation("key scales")]);
        self.add(by_layer, weights, allocated.clone(), vec![Table::Ablation("key scales")]);
        for basis in Basis::ALL {
            self.scaled(&pm(4), weights, &layer, basis);
        }
        self.scaled(&by_page, weights, &pages, Basis::Stretched);
        self.scaled(by_layer, weights, &allocated, Basis::Stretched);
    }
}

/// The name of rounding with an exact sink and window.
pub(super) fn rtn(bits: u32) -> String {
    format!("RTN-{bits}")
}

/// The name of KIVI.
pub(super) fn kivi_name(bits: u32) -> String {
    format!("KIVI-{bits}")
}

/// The name of the method at a width, whole layers halved.
pub(super) fn pm(bits: u32) -> String {
    format!("PM-KVQ F={bits}")
}

/// The name of the method at a width, page by page.
pub(super) fn pm_pages(bits: u32) -> String {
    format!("{}, pages, oldest first", pm(bits))
}

/// Every cache of a study.
pub fn variants(study: &Study) -> Vec<Variant> {
    let mut list = List { study, all: Vec::new() };
    list.rivals();
    list.method();
    list.equals();
    list.outliers();
    list.all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baselines::Baseline;

    #[test]
    fn names_are_one_of_a_kind_and_baselines_exist() {
        let study = Study::parse(include_str!("../../recipes/study.toml")).unwrap();
        let all = variants(&study);
        for (i, v) in all.iter().enumerate() {
            assert!(!all[..i].iter().any(|w| (&w.name, w.weights) == (&v.name, v.weights)), "{}", v.name);
            if let Kind::Baseline(name) = &v.kind {
                name.parse::<Baseline>().unwrap();
            }
        }
    }
}
