//! Time of a decode step with random weights, beside what reading the weights takes at the measured bandwidth:
//! `cargo run --release -p nics-core --example decode_speed -- bf16 1 2048`.

use std::time::Instant;

use nics_core::cache::DenseCache;
use nics_core::checkpoint::TensorPath;
use nics_core::device::{DtypeSpec, set_threads};
use nics_core::models::{self, Batch, Decoder, Input, Model};
use nics_core::seam::{KvCache, Ragged};
use tch::{Device, Kind, Tensor};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let kind = args.first().map_or("f32", String::as_str).parse::<DtypeSpec>()?.resolve(Kind::Float);
    let batch: usize = args.get(1).map_or(Ok(1), |a| a.parse())?;
    let context: usize = args.get(2).map_or(Ok(0), |a| a.parse())?;
    let steps: usize = args.get(3).map_or(Ok(20), |a| a.parse())?;
    let threads = set_threads(None)?;
    let config = serde_json::json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": true, "hidden_act": "silu"
    });
    let config = models::config(config.as_object().ok_or("no object")?)?;
    let start = Instant::now();
    let mut model = Decoder::load(config, &TensorPath::random(1, 0.02, Device::Cpu, kind))?;
    let mut bytes = 0;
    model.visit_parameters(&mut |_, t| {
        bytes += t.numel() * t.kind().elt_size_in_bytes();
        Ok(())
    })?;
    println!(
        "{:.1} s to make {:.2} GB of {kind:?} weights",
        start.elapsed().as_secs_f64(),
        bytes as f64 / 1e9
    );
    let limit = nics_kernels::memory::read_bandwidth(&nics_kernels::pool::own(), 1 << 30, 5);
    let _no_grad = tch::no_grad_guard();
    let mut cache = DenseCache::new();
    let seqs = (0..batch).map(|_| cache.open(context + steps + 8)).collect::<Result<Vec<_>, _>>()?;
    if context > 0 {
        for s in &seqs {
            let ids = Tensor::randint(1000, [context as i64], (Kind::Int64, Device::Cpu));
            let start = Instant::now();
            model.forward(
                &Batch::new(Ragged::contiguous(&[(*s, 0, context)]), Input::Ids(&ids)),
                &mut cache,
                None,
            )?;
            println!("prefill of {context}: {:.0} ms", start.elapsed().as_secs_f64() * 1e3);
        }
    }
    let mut times = Vec::new();
    for step in 0..steps + 3 {
        let rows: Vec<_> = seqs.iter().map(|s| (*s, context + step, 1)).collect();
        let ids = Tensor::randint(1000, [batch as i64], (Kind::Int64, Device::Cpu));
        let start = Instant::now();
        let out =
            model.forward(&Batch::new(Ragged::contiguous(&rows), Input::Ids(&ids)), &mut cache, None)?;
        let _ = std::hint::black_box(model.logits(&out.hidden)?);
        times.push(start.elapsed().as_secs_f64());
    }
    let mut times = times.split_off(3);
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let kv = cache.bytes().payload;
    let least = (bytes + kv) as f64 / limit;
    println!(
        "{kind:?} batch {batch} context {context}, {threads} threads: {:.2} ms a step (best {:.2}), {:.1} tokens/s, {:.0} % of {:.1} GB/s",
        median * 1e3,
        times[0] * 1e3,
        batch as f64 / median,
        100.0 * least / median,
        limit / 1e9
    );
    Ok(())
}
