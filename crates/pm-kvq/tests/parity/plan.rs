//! Schedules and allocations.

use std::collections::BTreeMap;

use pm_kvq::allocate::{allocate, unit};
use pm_kvq::ledger::{Count, Rules, Shape, Shrink, WindowMode};
use pm_kvq::{Bits, budget};
use serde_json::Value;

use crate::kit::cases;

const MIB: f64 = 1_048_576.0;

#[test]
fn schedules() {
    for case in cases("05_") {
        for row in case.json["cases"].as_array().unwrap() {
            let number = |key: &str| row[key].as_u64().unwrap() as usize;
            let fbit = Bits::try_from(number("fbit") as u32).unwrap();
            let budget = budget::official(fbit, number("kv_hidden") / 128, 128, number("max_len"));
            assert!((budget as f64 - row["budget_mib"].as_f64().unwrap() * MIB).abs() < 1e-6);
            let rules = Rules {
                shape: Shape { kv_heads: number("kv_hidden") / 128, head_dim: 128, group: 128, exact: 2 },
                sink: number("n_sink"),
                window: number("n_window"),
                mode: WindowMode::Block,
                init: Bits::B16,
                floor: Bits::B2,
                shrink: Shrink::Layer,
                budget: Some(budget),
                count: Count::Payload,
            };
            let end = row["memory_error_at_tokens"].as_u64().map(|n| n as usize);
            let found = budget::schedule(&rules, number("prefill"), number("tokens_reached") + 1);
            let mut found = found.unwrap();
            if end.is_none() {
                // The reference stopped counting there.
                found = budget::schedule(&rules, number("prefill"), number("tokens_reached")).unwrap();
            }
            let stages: Vec<(u64, u64)> =
                found.stages.iter().map(|s| (s.tokens as u64, u64::from(s.widest.get()))).collect();
            let expected: Vec<(u64, u64)> =
                serde_json::from_value(row["transitions_tokens_bits"].clone()).unwrap();
            assert_eq!(stages, expected);
            assert_eq!(found.exhausted_at, end);
            assert_eq!(found.reached, number("tokens_reached"));
        }
    }
}

#[test]
fn allocations() {
    for case in cases("14_") {
        let rows = case.json["cases"].as_array().unwrap();
        for row in rows {
            // Some rows are another one's problem, changed.
            let problem = row["same_as_case"].as_u64().map_or(row, |same| &rows[same as usize]);
            let number = |key: &str| problem[key].as_u64().unwrap() as usize;
            let times = row["sensitivity_times"].as_f64().unwrap_or(1.0);
            let mut sensitivity: BTreeMap<Bits, Vec<f64>> = BTreeMap::new();
            for (bits, k) in problem["k_sensitivity"].as_object().unwrap() {
                let list = |v: &Value| serde_json::from_value::<Vec<f64>>(v.clone()).unwrap();
                let (k, v) = (list(k), list(&problem["v_sensitivity"][bits]));
                let bits = Bits::try_from(bits.parse::<u32>().unwrap()).unwrap();
                sensitivity.insert(bits, k.iter().zip(&v).map(|(k, v)| (k + v) * times).collect());
            }
            let choices: Vec<Bits> = serde_json::from_value(problem["fbit_choices"].clone()).unwrap();
            let mib = row.get("memory_budget_mib").unwrap_or(&problem["memory_budget_mib"]).as_f64().unwrap();
            let unit = unit(number("kv_hidden") / 128, 128, number("max_len"));
            let found = allocate(&sensitivity, &choices, unit, mib * MIB);
            if row["infeasible"] == true {
                assert!(found.unwrap_err().to_string().contains("infeasible"));
                continue;
            }
            let found = found.unwrap();
            assert!(found.bytes.iter().sum::<f64>() <= mib * MIB + 1e-3);
            if let Some(objective) = row["objective"].as_f64() {
                // The fixtures' README: 2e-4 relative.
                assert!(
                    (found.objective - objective).abs() <= 2e-4 * objective,
                    "{} {objective}",
                    found.objective
                );
            }
            if let Some(exact) = row.get("exact_bitwidth") {
                assert_eq!(found.widths, serde_json::from_value::<Vec<Bits>>(exact.clone()).unwrap());
            }
        }
    }
}
