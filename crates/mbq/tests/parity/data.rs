//! Sample order, formats, masks, and the layouts of packed weights.

use mbq::data::collate::{Attention, Padded, Sample, Side, expand, is_answer, pad};
use mbq::data::format::{Format, formatted};
use mbq::data::order::shuffled;
use mbq::layout::{Zeros, awq, gptq};
use mbq::quantize::QTensor;
use tch::{Kind, Tensor};

use crate::kit::{Case, assert_same, case};

fn ids(t: &Tensor) -> Vec<i64> {
    Vec::try_from(t.to_kind(Kind::Int64)).unwrap()
}

fn flags(t: &Tensor) -> Vec<bool> {
    ids(t).into_iter().map(|v| v != 0).collect()
}

fn rows(t: &Tensor) -> Vec<Vec<i64>> {
    (0..t.size()[0]).map(|i| ids(&t.get(i))).collect()
}

/// Samples of a padded batch, without their padding.
fn samples(case: &Case) -> Vec<Sample> {
    let (all, labels, attention) =
        (case.tensor("input_ids"), case.tensor("labels"), case.tensor("attention_mask"));
    let one = |i| {
        let padded = Sample::new(ids(&all.get(i)), ids(&labels.get(i))).unwrap();
        padded.unpadded(&flags(&attention.get(i))).unwrap()
    };
    (0..all.size()[0]).map(one).collect()
}

fn assert_padded(found: &Padded, case: &Case, prefix: &str) {
    assert_eq!(found.ids, rows(case.tensor(&format!("{prefix}input_ids"))), "{prefix}ids");
    assert_eq!(found.labels, rows(case.tensor(&format!("{prefix}labels"))), "{prefix}labels");
    let attention: Vec<Vec<i64>> =
        found.attention.iter().map(|row| row.iter().map(|a| i64::from(*a)).collect()).collect();
    assert_eq!(attention, rows(case.tensor(&format!("{prefix}attention_mask"))), "{prefix}attention");
}

#[test]
fn formats() {
    let case = case("09_concat_formats");
    let samples = samples(&case);
    let texts: Vec<Vec<i64>> =
        (0..).map_while(|i| case.tensors.get(&format!("pure_text{i}"))).map(ids).collect();
    for (name, format) in [("few_shot", Format::FewShot), ("interleave", Format::Interleave)] {
        let joined = formatted(&samples, format, &texts).unwrap();
        for (prefix, side) in [("", Side::Right), ("left_", Side::Left)] {
            let found = pad(&joined, 0, side, Attention::Lengths);
            assert_padded(&found, &case, &format!("{prefix}{name}."));
        }
    }
    assert_eq!(formatted(&samples, Format::Plain, &[]).unwrap(), samples);
    assert!(formatted(&samples, Format::Interleave, &texts[..1]).is_err());
}

#[test]
fn collation() {
    let case = case("09_internvl_collate");
    let listed = |case: &Case, name: &str| -> Vec<Vec<i64>> {
        (0..).map_while(|i| case.tensors.get(&format!("{name}{i}"))).map(ids).collect()
    };
    let samples: Vec<Sample> = listed(&case, "ids")
        .into_iter()
        .zip(listed(&case, "labels"))
        .map(|(ids, labels)| Sample::new(ids, labels).unwrap())
        .collect();
    assert!(!samples.is_empty());
    let found = pad(&samples, case.field("pad_id"), Side::Right, Attention::Ids);
    assert_padded(&found, &case, "batch_");

    let case = crate::kit::case("09_qwen2vl_labels");
    let start = case.field("im_start_id");
    let samples: Vec<Sample> =
        listed(&case, "ids").into_iter().map(|ids| Sample::from_last_turn(ids, start).unwrap()).collect();
    let labels: Vec<&Vec<i64>> = samples.iter().map(|s| &s.labels).collect();
    assert_eq!(labels, listed(&case, "labels").iter().collect::<Vec<_>>());
    let found = pad(&samples, case.field("pad_id"), Side::Left, Attention::Ids);
    assert_padded(&found, &case, "batch_");
}

#[test]
fn masks_of_llava() {
    let case = case("09_llava_masks");
    let (images, length): (usize, usize) = (case.field("images_per_sample"), case.field("K"));
    let all = case.tensor("input_ids");
    // The placeholder is the one id below zero.
    let placeholder = all.min().int64_value(&[]);
    let longest = case.tensor("vision_mask").size()[1] as usize;
    for (i, sample) in samples(&case).iter().enumerate() {
        let found = expand(sample, placeholder, &vec![length; images]).unwrap();
        let row = |name: &str| case.tensor(name).get(i as i64);
        let filled = |of: Vec<i64>, with| {
            let mut of = of;
            of.resize(longest, with);
            of
        };
        let flag = |of: Vec<bool>| filled(of.into_iter().map(i64::from).collect(), 0);
        let n = found.labels.len();
        assert_eq!(flag(found.vision), ids(&row("vision_mask")));
        assert_eq!(flag(is_answer(&found.labels)), ids(&row("answer_mask")));
        assert_eq!(filled(found.labels, -100), ids(&row("expanded_labels")));
        assert_eq!(flag(vec![true; n]), ids(&row("expanded_attention_mask")));
    }
}

#[test]
fn order_of_samples() {
    let case = case("10_sample_order");
    for n in case.field::<Vec<usize>>("sizes") {
        for kind in ["list_shuffle", "permutation"] {
            let expected = ids(case.tensor(&format!("{kind}_{n}")));
            let found = shuffled(n, 42).into_iter().take(expected.len()).map(|i| i as i64);
            assert_eq!(found.collect::<Vec<_>>(), expected, "{kind} of {n}");
        }
    }
}

#[test]
fn packed_layouts() {
    let case = case("13_pack");
    let q = |name: &str| QTensor {
        q: case.tensor(name).to_kind(Kind::Uint8),
        scale: case.tensor("scales").shallow_clone(),
        zero: case.tensor("zeros").to_kind(Kind::Uint8),
    };
    let packed = awq(&q("ints"), Kind::Half).unwrap();
    for ((name, found), key) in packed.iter().zip(["qweight", "qzeros", "awq_scales_f16"]) {
        assert_same(found, case.tensor(key), name);
        assert_eq!(found.kind(), case.tensor(key).kind(), "{name}");
    }
    let packed = gptq(&q("ints3"), 3, Zeros::Exact, Kind::Half).unwrap();
    assert_same(&packed[0].1, case.tensor("gptq3_qweight"), packed[0].0);
}
