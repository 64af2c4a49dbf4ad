//! `mbq quantize`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use mbq::QuantSpec;
use mbq::apply::{Rounded, fold_scales, round};
use mbq::artefact::Scales;
use mbq::calibrate::Running;
use mbq::clip::ClipConfig;
use mbq::export::{Layout, Made, export};
use mbq::gptq::GptqConfig;
use mbq::methods::{Awq, Gptq, Mbq, Method, Rtn, SmoothQuant, Task};
use mbq::operators::check_groups;
use nics_base::exit::Usage;
use nics_base::interrupt::Interrupt;
use nics_core::cli::ModelArgs;
use nics_core::models::{Model, ModelDims};
use nics_kernels::packed::Packed;

use super::calibrate::{LimitArgs, SearchArgs, bar};
use super::data::{DataArgs, report};
use super::opened::Opened;

/// Quantizes the language model of a checkpoint and writes it as a checkpoint that other engines load.
///
/// With --scales it takes what `mbq calibrate` found; otherwise it calibrates first, by a method of choice.
#[derive(Args)]
pub struct Quantize {
    #[command(flatten)]
    model: ModelArgs,
    /// Scales of `mbq calibrate` or `mbq import`, in place of a method
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["method", "data", "texts"])]
    scales: Option<PathBuf>,
    /// How to quantize
    #[arg(long, value_enum, default_value_t = Name::Mbq)]
    method: Name,
    /// MBQ and AWQ: shrink the range of each group of weights behind the search, as long as its output comes out better
    #[arg(long, conflicts_with = "scales")]
    clip: bool,
    /// SmoothQuant: how much goes from activations to weights, 0 to 1
    #[arg(long, value_name = "A", default_value_t = 0.5)]
    alpha: f64,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    search: SearchArgs,
    #[command(flatten)]
    limits: LimitArgs,
    /// How weights are stored: dense (rounded, in the model's dtype), packed (our own: 2 to 8 bits, activations too), autoawq
    /// (4 bits), gptq (2, 3, 4, 8 bits), compressed-tensors (4, 8 bits)
    #[arg(long, value_name = "LAYOUT", default_value_t = Layout::Dense)]
    layout: Layout,
    /// Folder of the quantized checkpoint; it must not exist
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
}

/// A method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Name {
    /// Scales searched with errors balanced between modalities
    Mbq,
    /// Scales searched with squared errors, all positions alike
    Awq,
    /// As AutoAWQ: duo scaling and clipping
    AwqFull,
    /// Columns rounded one after the other
    Gptq,
    /// Activations smoothed at the cost of weights
    Smoothquant,
    /// Rounding to nearest
    Rtn,
}

/// Says beforehand that layers in our own layout will have no kernel.
fn kernels(layout: Layout, dims: &ModelDims, spec: &QuantSpec) {
    if layout != Layout::Packed {
        return;
    }
    for input in [dims.hidden, dims.heads * dims.head_dim, dims.intermediate] {
        let group = if spec.act_bits.is_some() || spec.group == -1 { input } else { spec.group };
        if let Err(e) = Packed::check(u32::from(spec.bits), input as usize, group as usize) {
            tracing::warn!("no kernel for {e}: what is written will be run in a slower way");
        }
    }
}

impl Quantize {
    fn method(&self) -> Box<dyn Method> {
        let spec = self.search.quant;
        match self.method {
            Name::Mbq => {
                Box::new(Mbq { config: self.search.config(), clip: self.clip.then(ClipConfig::default) })
            }
            Name::Awq => Box::new(Awq { clip: self.clip.then(ClipConfig::default), ..Awq::new(spec) }),
            Name::AwqFull => Box::new(Awq::full(spec)),
            Name::Gptq => Box::new(Gptq { config: GptqConfig::new(spec.bits, spec.group) }),
            Name::Smoothquant => Box::new(SmoothQuant { spec, alpha: self.alpha }),
            Name::Rtn => Box::new(Rtn { spec }),
        }
    }

    pub fn run(self, quiet: bool) -> Result<()> {
        if self.out.symlink_metadata().is_ok() {
            bail!("{} is there already; choose a folder that does not exist", self.out.display());
        }
        if self.clip && !matches!(self.method, Name::Mbq | Name::Awq | Name::AwqFull) {
            return Err(Usage("--clip goes with --method mbq and awq".into()).into());
        }
        if self.method == Name::Gptq && self.search.quant.act_bits.is_some() {
            return Err(Usage("--method gptq rounds weights alone; give e.g. --quant w3g128".into()).into());
        }
        let mut opened = Opened::open(&self.model)?;
        let interrupt = Interrupt::install()?;
        let (spec, rounded) = if let Some(dir) = &self.scales {
            let scales = Scales::read(dir, &opened.origin)?;
            let spec = scales.config.search.spec;
            self.layout.check(&spec)?;
            kernels(self.layout, opened.model.decoder().dims(), &spec);
            let decoder = opened.model.decoder_mut();
            fold_scales(decoder, &opened.names, &scales.layers)?;
            (spec, round(decoder, &opened.names, &spec)?)
        } else {
            let spec = self.method().spec();
            self.layout.check(&spec)?;
            check_groups(opened.model.decoder().dims(), &opened.names, &spec)?;
            kernels(self.layout, opened.model.decoder().dims(), &spec);
            (spec, self.by_method(&mut opened, &interrupt, quiet)?)
        };
        let Opened { checkpoint, model, names, origin, .. } = &mut opened;
        let method = match &self.scales {
            Some(_) => Name::Mbq,
            None => self.method,
        };
        let method = method.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned());
        let made = Made { method, source: origin.clone() };
        export(model, names, &rounded, &spec, &made, checkpoint, self.layout, &self.out)?;
        let s = &rounded.summary;
        println!(
            "{} linear layers of {} decoder layers, {} weights: {}, stored as {}",
            s.linears, s.layers, s.weights, s.spec, self.layout
        );
        println!("{}", self.out.display());
        Ok(())
    }

    fn by_method(&self, opened: &mut Opened, interrupt: &Interrupt, quiet: bool) -> Result<Rounded> {
        let batch = if self.method == Name::Rtn {
            None
        } else {
            let _no_grad = tch::no_grad_guard();
            let batch = self.data.batch(&opened.checkpoint, &opened.model, quiet)?;
            report(&batch)?;
            Some(batch)
        };
        let mut progress = bar(quiet);
        let running = Running {
            out: None,
            chunk: self.limits.chunk,
            max_memory: self.limits.max_memory.map(|s| s.0 as u64),
            interrupt,
            progress: &mut progress,
        };
        let task = Task { names: &opened.names, batch: batch.as_ref(), origin: &opened.origin, running };
        Ok(self.method().quantize(opened.model.decoder_mut(), task)?.rounded)
    }
}
