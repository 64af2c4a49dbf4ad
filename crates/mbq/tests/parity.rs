//! Parity with fixtures of the reference implementation. `NICS_GOLDEN=dir` holds the crate against another set of the
//! same format.

#[path = "parity/answers.rs"]
mod answers;
#[path = "parity/data.rs"]
mod data;
#[path = "parity/kit.rs"]
mod kit;
#[path = "parity/models.rs"]
mod models;
#[path = "parity/numbers.rs"]
mod numbers;
#[path = "parity/rivals.rs"]
mod rivals;
#[path = "parity/search.rs"]
mod search;

use nics_core::golden::Kinds;

/// Each case of these fixtures is a kind of its own.
pub const KINDS: Kinds = Kinds {
    run: &[
        "01_quant_asym",
        "02_quant_sym",
        "03_wa_linear",
        "04_scale_grid",
        "05_apply_scale",
        "06_block_search",
        "07_internlm2_w3_mae_rw",
        "07_internlm2_w4a8_mae_rw_distort",
        "07_llama_w3_mae_rw",
        "07_llama_w4a8_mae_rw",
        "07_llava_qwen_w3_mae_norw",
        "07_llava_qwen_w3_mae_rw",
        "07_llava_qwen_w3_mae_rw_distort",
        "07_llava_qwen_w3_mse_rw",
        "07_llava_qwen_w4_mse_norw",
        "07_llava_qwen_w4a8_mae_rw",
        "07_llava_qwen_w4a8_mae_rw_distort",
        "07_llava_qwen_w8a8_mse_norw",
        "07_qwen2_vl_w3_mae_rw",
        "07_qwen2_vl_w4a8_mae_rw",
        "08_internlm2_rtn_sq",
        "08_llava_qwen_rtn_sq",
        "09_concat_formats",
        "09_internvl_collate",
        "09_llava_masks",
        "09_qwen2vl_labels",
        "10_sample_order",
        "11_awq_clip",
        "12_gptq",
        "13_pack",
        "14_eval_answers",
        "14_vqa_contractions",
    ],
    later: &[],
    parts: &[
        "README.md",
        "index.json",
        "07_internlm2_batch.json",
        "07_internlm2_batch.safetensors",
        "07_internlm2_model.json",
        "07_internlm2_model.safetensors",
        "07_llama_batch.json",
        "07_llama_batch.safetensors",
        "07_llama_model.json",
        "07_llama_model.safetensors",
        "07_llava_qwen_batch.json",
        "07_llava_qwen_batch.safetensors",
        "07_llava_qwen_model.json",
        "07_llava_qwen_model.safetensors",
        "07_qwen2_vl_batch.json",
        "07_qwen2_vl_batch.safetensors",
        "07_qwen2_vl_model.json",
        "07_qwen2_vl_model.safetensors",
    ],
};

#[test]
fn every_case_of_the_folder_is_known() {
    assert!(kit::golden().check(KINDS).unwrap() >= KINDS.run.len());
}
