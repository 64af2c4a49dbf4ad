//! Behind a model: a generator ends where the budget does, and a server's settings work.

use nics_core::checkpoint::Checkpoint;
use nics_core::generate;
use nics_core::models::{self, Decoder, Model, read_last};
use nics_core::seam::KvCache;
use pm_kvq::cache::{CacheConfig, PagedCache};
use tch::{Device, Kind};

use crate::kit::config;

fn model() -> Decoder {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
    let file = |name: &str| std::path::Path::new(golden).join(name);
    let checkpoint =
        Checkpoint::open_files(&file("model_qwen2.json"), &[file("model_qwen2.safetensors")]).unwrap();
    models::load(&checkpoint, Device::Cpu, Kind::Float).unwrap()
}

/// Greedy tokens, and why they ended.
fn greedy(
    model: &Decoder,
    config: &CacheConfig,
    prompt: &[u32],
    most: usize,
) -> (Vec<u32>, Option<generate::Finish>) {
    let mut cache = PagedCache::new(model.dims(), config).unwrap();
    let request = generate::Request::greedy(prompt.to_vec(), most, &[]);
    let mut generator = generate::Generator::new(model, &mut cache);
    generator.add(request).unwrap();
    let mut tokens = Vec::new();
    loop {
        for token in generator.step().unwrap() {
            tokens.push(token.token);
            if let Some(finish) = token.finish {
                return (tokens, Some(finish));
            }
        }
        assert!(tokens.len() <= most);
    }
}

#[test]
fn generation_ends_where_the_plan_says() {
    let model = model();
    let prompt: Vec<u32> = (1..20).collect();
    let settings = config("sink=1,window=8,window-mode=block,min-bits=4,max-len=60");
    let (tokens, finish) = greedy(&model, &settings, &prompt, 200);
    assert_eq!(finish, Some(generate::Finish::Context));
    let rules = settings.rules(model.dims()).unwrap();
    let plan = pm_kvq::budget::schedule(&rules[0], prompt.len(), 400).unwrap();
    // The last token is written, but its row never comes.
    assert_eq!(prompt.len() + tokens.len() - 1, plan.reached);
    let (all, finish) = greedy(&model, &config("window=8"), &prompt, 100);
    assert_eq!((all.len(), finish), (100, Some(generate::Finish::Length)));
}

#[test]
fn the_first_rows_are_exact_and_low_widths_come_close() {
    let model = model();
    let ids: Vec<u32> = (0..120u32).map(|i| i * 7 % 64).collect();
    let logits = |words: &str| {
        let _no_grad = tch::no_grad_guard();
        let mut cache = PagedCache::new(model.dims(), &config(words)).unwrap();
        let s = cache.open(200).unwrap();
        let mut out = Vec::new();
        let mut at = 0;
        while at < ids.len() {
            let to = if at == 0 { 30 } else { at + 1 };
            let hidden = read_last(&model, &mut cache, &[(s, at, &ids[at..to])]).unwrap();
            out.push(model.logits(&hidden).unwrap());
            at = to;
        }
        tch::Tensor::cat(&out, 0)
    };
    let exact = logits("window=8,exact=f32");
    for (words, most) in [
        ("window=8,exact=f16", 0.01),
        ("window=8,exact=f32,min-bits=8,max-len=120", 0.1),
        ("window=8,exact=f32,min-bits=4,max-len=120", 0.8),
    ] {
        let off = (logits(words) - &exact).abs().mean(Kind::Float).double_value(&[]);
        assert!(off < most, "{words}: logits off by {off} in the mean");
    }
}
