//! Parity with fixtures of the reference implementation. `NICS_GOLDEN=dir` holds the crate against another set of the
//! same format.

#[path = "parity/calibration.rs"]
mod calibration;
#[path = "parity/formats.rs"]
mod formats;
#[path = "parity/kit.rs"]
mod kit;
#[path = "parity/models.rs"]
mod models;
#[path = "parity/numbers.rs"]
mod numbers;
#[path = "parity/rivals.rs"]
mod rivals;
#[path = "parity/text.rs"]
mod text;

#[path = "parity/official.rs"]
mod official;
#[path = "parity/plan.rs"]
mod plan;

use nics_core::golden::Kinds;

/// Each case of these fixtures is a kind of its own.
pub const KINDS: Kinds = Kinds {
    run: &[
        "01_fake_quant",
        "02_pack_dequant",
        "03_shrink",
        "04_cache_a_bf16",
        "04_cache_a_f32",
        "04_cache_b_bf16",
        "04_cache_b_f32",
        "04_cache_exhaust_bf16",
        "04_cache_exhaust_f32",
        "04_cache_init4_bf16",
        "04_cache_init4_f32",
        "05_schedule",
        "06_plain_llama",
        "06_plain_qwen2",
        "07_progressive_fake_exhaust_qwen2",
        "07_progressive_fake_llama",
        "07_progressive_fake_qwen2",
        "08_progressive_real_llama",
        "08_progressive_real_qwen2",
        "09_sensitivity_llama",
        "09_sensitivity_qwen2",
        "10_max_keys_llama",
        "10_max_keys_qwen2",
        "11_search_llama",
        "11_search_qwen2",
        "12_pmkvq_full_llama",
        "12_pmkvq_full_qwen2",
        "13_baselines_llama",
        "13_baselines_qwen2",
        "14_allocation",
        "15_hadamard",
        "16_answer_text",
        "17_everyday_baselines",
    ],
    later: &[],
    parts: &[
        "README.md",
        "model_llama.json",
        "model_llama.safetensors",
        "model_qwen2.json",
        "model_qwen2.safetensors",
    ],
};

#[test]
fn every_case_of_the_folder_is_known() {
    assert!(kit::golden().check(KINDS).unwrap() >= KINDS.run.len());
}
