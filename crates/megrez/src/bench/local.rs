//! The protocol with a model of this process.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use nics_core::generate::{Generator, Prompt, Request, Token};
use nics_core::models::Model;
use nics_core::sampling::Sampling;
use nics_core::seam::{KvCache, LayerHook};
use nics_core::{Error, Result, memory};
use serde::Serialize;

use super::{Protocol, rate};

/// One run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Run {
    /// Sequences per second, from the first row to the last token.
    pub requests_per_s: f64,
    /// Prompt tokens per second, up to each sequence's first token.
    pub prefill_per_s: f64,
    /// Tokens per second after it, all sequences together; 0 when replies are of one token.
    pub decode_per_s: f64,
    /// Prompt and reply tokens per second, overall.
    pub total_per_s: f64,
    /// Bytes allocated for keys and values just before the end.
    pub kv_bytes: usize,
    /// Most resident memory during the run, in bytes, where the system tells it.
    pub peak_rss: Option<u64>,
    /// Seconds of the run.
    pub seconds: f64,
}

/// Runs the protocol once. `prompt` is repeated or cut to its length.
///
/// # Errors
/// A protocol that does not fit the model, or what the model returns.
pub fn measure(
    model: &dyn Model,
    cache: &mut dyn KvCache,
    mut hook: Option<&mut dyn LayerHook>,
    protocol: &Protocol,
    prompt: &[u32],
) -> Result<Run> {
    let Protocol { input_len, output_len, seqs, batch } = *protocol;
    if input_len == 0 || output_len == 0 || seqs == 0 || batch == 0 || prompt.is_empty() {
        return Err(Error::input("lengths, sequences and batch are at least 1, and the prompt is not empty"));
    }
    let context = model.dims().context;
    if input_len + output_len > context {
        let what = "the model's context";
        return Err(Error::ContextOverflow { need: input_len + output_len, max: context, what });
    }
    let ids: Vec<u32> = prompt.iter().copied().cycle().take(input_len).collect();
    let resettable = memory::reset_peak();
    let (mut prefill, mut decode) = (Duration::ZERO, Duration::ZERO);
    let mut kv_bytes = 0;
    let (mut left, mut decoded) = (seqs, 0);
    while left > 0 {
        let wave = left.min(batch);
        left -= wave;
        let mut generator = Generator::new(model, cache);
        if let Some(hook) = &mut hook {
            generator = generator.with_hook(&mut **hook);
        }
        for _ in 0..wave {
            generator.add(Request {
                prompt: Prompt::Ids(ids.clone()),
                sampling: Sampling::default(),
                max_new_tokens: output_len,
                eos: Vec::new(),
            })?;
        }
        let start = Instant::now();
        // A sequence whose prompt was read early writes on while others are read.
        let (mut written, mut begun) = (0, HashSet::new());
        while begun.len() < wave {
            let tokens = step(&mut generator)?;
            written += tokens.len();
            begun.extend(tokens.iter().map(|t| t.request));
        }
        let before = written;
        prefill += start.elapsed();
        let start = Instant::now();
        let all = wave * output_len;
        while written < all {
            // The last step closes the sequences.
            if all - written <= wave {
                kv_bytes = kv_bytes.max(generator.cache().bytes().allocated);
            }
            written += step(&mut generator)?.len();
        }
        decode += start.elapsed();
        decoded += all - before;
    }
    let total = prefill + decode;
    Ok(Run {
        requests_per_s: rate(seqs, total),
        prefill_per_s: rate(seqs * input_len, prefill),
        decode_per_s: if decoded == 0 { 0.0 } else { rate(decoded, decode) },
        total_per_s: rate(seqs * (input_len + output_len), total),
        kv_bytes,
        peak_rss: memory::peak_resident().filter(|_| resettable),
        seconds: total.as_secs_f64(),
    })
}

/// Tokens that a step wrote.
fn step(generator: &mut Generator) -> Result<Vec<Token>> {
    let tokens = generator.step()?;
    if generator.running() == 0 && tokens.is_empty() {
        return Err(Error::input("the model stopped writing before the end"));
    }
    Ok(tokens)
}
