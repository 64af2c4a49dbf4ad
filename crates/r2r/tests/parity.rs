//! Parity with fixtures of the reference implementation. `NICS_GOLDEN=dir` holds the crate against another set of the
//! same format.

#[path = "parity/decode.rs"]
mod decode;
#[path = "parity/evaluation.rs"]
mod evaluation;
#[path = "parity/kit.rs"]
mod kit;
#[path = "parity/labels.rs"]
mod labels;
#[path = "parity/policies.rs"]
mod policies;
#[path = "parity/routers.rs"]
mod routers;
#[path = "parity/training.rs"]
mod training;

use nics_core::golden::Kinds;

const KINDS: Kinds = Kinds {
    run: &[
        "decode_loop",
        "evaluation",
        "judge_parse",
        "mismatch_and_labels",
        "prefill_features",
        "sentences",
        "stops",
        "token_types",
        "route_bf16",
        "route_fp32",
        "router_ckpt",
        "router_hidden",
        "router_hidden_lmhead_topk",
        "router_hidden_logits",
        "router_hidden_token",
        "router_logits",
        "router_logits_pos",
        "router_main",
        "router_main_normalized",
        "router_multi_logits",
        "uncertainty",
        "thresholds",
        "training",
        "strategies",
        "sampling",
        "losses",
    ],
    later: &[],
    parts: &["README.md"],
};

#[test]
fn every_case_of_the_folder_is_known() {
    assert!(kit::golden().check(KINDS).unwrap() >= KINDS.run.len());
}
