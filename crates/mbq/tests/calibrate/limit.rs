//! The memory limit, measured from outside.

use std::process::{Command, Stdio};

use mbq::QuantSpec;
use mbq::batch::{CalibBatch, Modality};
use mbq::methods::Mbq;
use nics_core::models;
use nics_core::tch::{Device, Kind, Tensor};
use serde_json::json;

use crate::kit::{Asked, calibrated, normal};

const MIB: u64 = 1 << 20;
/// What libtorch's pools and the allocator keep beside tensors.
const SLACK: u64 = 24 * MIB;

/// A figure of `/proc/self/status`, in bytes.
fn status(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|l| l.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Calibrates under the limit that the variable names, and prints how far memory rose.
#[test]
#[ignore = "run by the test below in a process of its own"]
fn calibrates_under_a_limit() {
    let Ok(limit) = std::env::var("MBQ_TEST_LIMIT") else { return };
    let limit: u64 = limit.parse().unwrap();
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 256, "intermediate_size": 768,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200,
    });
    let config = models::config(config.as_object().unwrap()).unwrap();
    let mut decoder = models::random(config, Device::Cpu, Kind::Float, 3).unwrap();
    let (samples, positions) = (16, 192);
    let embeds = normal(&[samples, positions, 256], 5);
    let at = |from: i64, to: i64| {
        let place = Tensor::arange(positions, (Kind::Int64, Device::Cpu)).repeat([samples, 1]);
        place.ge(from).logical_and(&place.lt(to))
    };
    let labels = Tensor::full([samples, positions], 7, (Kind::Int64, Device::Cpu));
    let labels = labels.masked_fill(&at(150, positions).logical_not(), -100);
    let all = at(0, positions);
    let vision = Modality { name: "vision".into(), mask: at(5, 140) };
    let batch = CalibBatch::new(&embeds, all, labels, vec![vision]).unwrap();
    drop(embeds);
    let mut config = Mbq::new(QuantSpec::weights(3, 64)).config;
    config.search.grid = 4;
    // The first steps of libtorch allocate what stays.
    let small = crate::kit::batch();
    calibrated(&mut crate::kit::decoder(2, Kind::Float), &small, &crate::kit::config(), &Asked::default())
        .unwrap();
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS");
    let asked = Asked { max_memory: (limit > 0).then_some(limit), ..Asked::default() };
    calibrated(&mut decoder, &batch, &config, &asked).unwrap();
    println!("rose by {}", status("VmHWM").saturating_sub(before));
}

#[test]
#[ignore = "long: memory of whole calibrations, each in a process of its own"]
fn memory_stays_within_its_limit() {
    let rose = |limit: u64| -> u64 {
        let ran = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "limit::calibrates_under_a_limit"])
            .env("MBQ_TEST_LIMIT", limit.to_string())
            .stderr(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8(ran.stdout).unwrap();
        assert!(ran.status.success(), "{text}");
        let line = text.lines().find_map(|l| l.split("rose by ").nth(1)).unwrap_or_else(|| panic!("{text}"));
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    let free = rose(0);
    for limit in [64 * MIB, 96 * MIB] {
        let under = rose(limit);
        println!("limit {} MiB: rose by {} MiB, without one {} MiB", limit / MIB, under / MIB, free / MIB);
        assert!(under <= limit + SLACK, "{under} bytes under a limit of {limit}");
        assert!(under < free, "a limit of {limit} does not bind: {under} and {free} bytes");
    }
}
