//! Loading a packed model takes what the packed model takes. Alone in its binary: other tests would count in.
#![cfg(target_os = "linux")]

use mbq::QuantSpec;
use mbq::layout::packed;
use mbq::packed::open;
use mbq::quantize::quantize_group;
use mbq::stored::PackedConfig;
use nics_core::checkpoint::{Checkpoint, Origin, save};
use nics_core::memory::{peak_resident, reset_peak};
use nics_core::models::{self, DecoderConfig, Model};
use nics_core::tch::{Device, Kind, Tensor};
use serde_json::json;

#[test]
fn no_dense_weight_is_ever_held() {
    let (hidden, inner, layers) = (1024i64, 4096i64, 4i64);
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 64,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    });
    let dir = tempfile::tempdir().unwrap();
    let (plain, to) = (dir.path().join("plain"), dir.path().join("packed"));
    let spec = QuantSpec::weights(3, 128);
    // Of each shape one weight, for all layers: what is measured does not depend on the values.
    let of = |out: i64, input: i64| {
        let w = Tensor::arange(out * input, (Kind::Float, Device::Cpu)).sin().view([out, input]);
        packed(&quantize_group(&w, &spec).unwrap(), 3, false).unwrap()
    };
    let (square, wide, long) = (of(hidden, hidden), of(inner, hidden), of(hidden, inner));
    let half = |shape: &[i64]| Tensor::ones(shape, (Kind::BFloat16, Device::Cpu));
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), half(&[64, hidden])),
        ("model.norm.weight".to_owned(), half(&[hidden])),
    ];
    for l in 0..layers {
        for (name, parts) in [
            ("self_attn.q_proj", &square),
            ("self_attn.k_proj", &square),
            ("self_attn.v_proj", &square),
            ("self_attn.o_proj", &square),
            ("mlp.gate_proj", &wide),
            ("mlp.up_proj", &wide),
            ("mlp.down_proj", &long),
        ] {
            let at = |part: &str| format!("model.layers.{l}.{name}.{part}");
            tensors.extend(parts.iter().map(|(part, t)| (at(part), t.shallow_clone())));
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("model.layers.{l}.{norm}.weight"), half(&[hidden])));
        }
    }
    save(&plain, vec![("x".to_owned(), half(&[1]))], &config, u64::MAX).unwrap();
    let arch_hash = Checkpoint::open_dir(&plain).unwrap().arch_hash();
    let source = Origin { model: "made".into(), arch_hash, weights_hash: String::new() };
    config["quantization_config"] =
        serde_json::to_value(PackedConfig::new(3, 128, None, "rtn", source)).unwrap();
    save(&to, tensors, &config, u64::MAX).unwrap();
    drop((square, wide, long));

    let load = || {
        let checkpoint = open(Checkpoint::open_dir(&to).unwrap(), None).unwrap();
        models::load(&checkpoint, Device::Cpu, Kind::BFloat16).unwrap()
    };
    // Warm-up: what libtorch and the allocator keep.
    let parameters = {
        let mut model = load();
        let DecoderConfig { layers, .. } = model.config().clone();
        let mut bytes = 0;
        model
            .visit_projections(&mut |_, p| {
                bytes += p.as_packed().map_or(0, |p| p.weight().bytes());
                Ok(())
            })
            .unwrap();
        assert_eq!(layers, 4);
        bytes
    };
    assert!(reset_peak(), "the peak of this process cannot be reset");
    let before = peak_resident().unwrap() as usize;
    let model = load();
    let grown = (peak_resident().unwrap() as usize).saturating_sub(before);
    assert_eq!(model.dims().layers, 4);
    let dense = 2 * layers * (4 * hidden * hidden + 3 * hidden * inner);
    println!("packed {parameters} bytes, dense {dense}; loading took {grown}");
    // Beside the packed layers there is one at a time on its way: its codes take a byte each, some copies of them.
    let one = (hidden * inner) as usize;
    assert!(grown < parameters + 5 * one, "{grown} bytes for {parameters}");
    assert!(grown < dense as usize / 2);
}
