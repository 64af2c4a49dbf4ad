//! The folder's models and batches.

use mbq::batch::{CalibBatch, Modality, Seating};
use mbq::operators::Names;
use mbq::run;
use nics_core::checkpoint::TensorPath;
use nics_core::models::{self, Decoder, Model};
use serde_json::json;
use tch::Tensor;

use crate::kit::case;

/// A model under the names of its checkpoint.
pub fn model(name: &str) -> (Decoder, Names) {
    let case = case(name);
    let kind: String = case.field("kind");
    let size = |name: &str| -> i64 { case.field(name) };
    let architecture = match kind.as_str() {
        "internlm2" => "InternLM2ForCausalLM",
        "llama" => "LlamaForCausalLM",
        _ => "Qwen2ForCausalLM",
    };
    let config = json!({
        "architectures": [architecture],
        "hidden_size": size("hidden"),
        "intermediate_size": size("inter"),
        "num_hidden_layers": size("layers"),
        "num_attention_heads": size("heads"),
        "num_key_value_heads": size("kv"),
        "vocab_size": size("vocab"),
        "rope_theta": case.field::<f64>("theta"),
        "rms_norm_eps": case.field::<f64>("eps"),
    });
    let config = models::config(config.as_object().unwrap()).unwrap();
    let tensors = case.tensors.iter().map(|(k, t)| (k.clone(), t.shallow_clone())).collect();
    let root = TensorPath::from_tensors(tensors);
    let (root, prefix) = if root.has("model.norm.weight") {
        (root, "")
    } else {
        (root.at("language_model"), "language_model.")
    };
    let decoder = models::load_at(config, &root).unwrap();
    let names = Names::of(&decoder, &format!("{prefix}model.layers"));
    (decoder, names)
}

/// A batch.
pub fn batch(name: &str) -> CalibBatch {
    let case = case(name);
    let at = |name: &str| case.tensor(name).shallow_clone();
    let vision = Modality { name: "vision".into(), mask: at("vision_mask") };
    CalibBatch::new(&at("inputs_embeds"), at("attention_mask"), at("labels"), vec![vision]).unwrap()
}

/// Logits of the first samples, `[samples, positions, vocab]`.
pub fn logits(decoder: &Decoder, batch: &CalibBatch, samples: i64) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let seats = Seating::of(decoder, batch).unwrap().seats(0, samples).unwrap();
    let hidden = batch.embeds().size()[2];
    let mut x = batch.embeds().narrow(0, 0, samples).reshape([-1, hidden]);
    for layer in &decoder.layers {
        x = run::layer(layer, &seats, &x).unwrap().output;
    }
    let logits = decoder.logits(&decoder.norm.forward(&x).unwrap()).unwrap();
    logits.view([samples, batch.positions(), -1])
}

/// The weight of a linear layer, by its checkpoint's name.
pub fn weight(decoder: &mut Decoder, name: &str) -> Tensor {
    let name = name.trim_start_matches("language_model.");
    let mut found = None;
    decoder
        .visit_parameters(&mut |key, t| {
            if key == name {
                found = Some(t.shallow_clone());
            }
            Ok(())
        })
        .unwrap();
    found.unwrap_or_else(|| panic!("no parameter {name}"))
}
