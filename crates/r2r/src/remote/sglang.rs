//! SGLang's `/generate` with token ids.

use serde::Serialize;
use serde_json::Value;

use super::fault::Fault;
use super::protocol::{Ask, Choosing, Chosen, Given, in_order, only_id};

#[derive(Serialize)]
struct Body<'a> {
    input_ids: Vec<&'a [u32]>,
    sampling_params: Vec<Parameters>,
    stream: bool,
}

#[derive(Serialize)]
struct Parameters {
    max_new_tokens: usize,
    #[serde(flatten)]
    choosing: Choosing,
    /// Heeded by servers that run with `--enable-deterministic-inference`.
    #[serde(skip_serializing_if = "Option::is_none")]
    sampling_seed: Option<u64>,
}

pub(super) fn body(asks: &[&Ask]) -> String {
    let parameters = |ask: &&Ask| Parameters {
        max_new_tokens: 1,
        choosing: Choosing::from(*ask),
        sampling_seed: ask.is_drawn().then_some(ask.sampling.seed),
    };
    let body = Body {
        input_ids: asks.iter().map(|ask| ask.ids.as_slice()).collect(),
        sampling_params: asks.iter().map(parameters).collect(),
        stream: false,
    };
    serde_json::to_string(&body).unwrap_or_default()
}

/// A list of answers, or a single one.
pub(super) fn read(reply: &Value, count: usize) -> Result<Given, Fault> {
    let answers = match reply {
        Value::Array(list) => list.as_slice(),
        one @ Value::Object(_) => std::slice::from_ref(one),
        _ => return Err(Fault::Protocol("it is neither a list of answers nor an answer".into())),
    };
    let one = |answer: &Value| {
        let cached = answer["meta_info"]["cached_tokens"].as_u64().map(|n| n as usize);
        Ok(Chosen { token: only_id(&answer["output_ids"], "output_ids")?, cached })
    };
    let chosen: Vec<Chosen> = in_order(answers, count)?.into_iter().map(one).collect::<Result<_, Fault>>()?;
    let cached = chosen.iter().map(|c| c.cached).sum();
    Ok(Given { chosen, cached })
}

#[cfg(test)]
mod tests {
    use nics_core::sampling::Sampling;
    use serde_json::json;

    use super::*;

    #[test]
    fn each_sequence_has_its_own_parameters() {
        let ask = |ids: &[u32], temperature, banned: &[u32]| Ask {
            ids: ids.to_vec(),
            sampling: Sampling { temperature, seed: 3, top_k: 40, ..Sampling::default() },
            banned: banned.to_vec(),
        };
        let (a, b) = (ask(&[1, 2], 0.0, &[]), ask(&[3], 0.5, &[8]));
        let body: Value = serde_json::from_str(&body(&[&a, &b])).unwrap();
        assert_eq!(body["input_ids"], json!([[1, 2], [3]]));
        let expected = json!({
            "max_new_tokens": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 40, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": true,
            "skip_special_tokens": false,
        });
        assert_eq!(body["sampling_params"][0], expected);
        assert_eq!(body["sampling_params"][1]["sampling_seed"], 3);
        assert_eq!(body["sampling_params"][1]["logit_bias"], json!({"8": -100}));
    }

    #[test]
    fn one_answer_or_a_list_of_them() {
        let answer = |id: u32| json!({"text": "", "output_ids": [id], "meta_info": {"cached_tokens": 2}});
        let one = read(&answer(5), 1).unwrap();
        assert_eq!((one.chosen[0].token, one.cached), (5, Some(2)));
        let two = read(&json!([answer(5), answer(6)]), 2).unwrap();
        assert_eq!((two.chosen[1].token, two.cached), (6, Some(4)));
        for (reply, count) in [(answer(5), 2), (json!([answer(5)]), 2), (json!("no"), 1), (json!({}), 1)] {
            assert!(matches!(read(&reply, count), Err(Fault::Protocol(_))));
        }
    }
}
