//! Every method on the same model and samples.

use mbq::QuantSpec;
use mbq::calibrate::Running;
use mbq::gptq::GptqConfig;
use mbq::layer::{LayerWeights, Role};
use mbq::methods::{Awq, Gptq, Mbq, Method, Rtn, SmoothQuant, Task};
use nics_base::interrupt::Interrupt;
use nics_core::tch::Kind;

use crate::kit::{batch, decoder, logits, names, origin};

/// The mean squared error of a method's logits.
fn error(method: &dyn Method, chunk: Option<usize>) -> f64 {
    let batch = batch();
    let mut decoder = decoder(2, Kind::Float);
    let float = logits(&decoder, &batch);
    let names = names(&decoder);
    let running =
        Running { out: None, chunk, max_memory: None, interrupt: &Interrupt::never(), progress: &mut |_| {} };
    let task = Task { names: &names, batch: Some(&batch), origin: &origin(), running };
    let made = method.quantize(&mut decoder, task).unwrap();
    assert_eq!(made.rounded.summary.layers, 3);
    assert_eq!(made.rounded.summary.spec, method.spec().to_string());
    // The integers are those of the model.
    assert_eq!(made.rounded.codes.len(), decoder.layers.len());
    for (layer, codes) in decoder.layers.iter_mut().zip(&made.rounded.codes) {
        assert_eq!(codes.iter().map(|(r, _)| *r).collect::<Vec<_>>(), Role::of(layer));
        let weights = LayerWeights::of(layer).unwrap();
        for (role, code) in codes {
            assert!(code.dequantize().unwrap().equal(&weights.linear(*role).unwrap().weight));
        }
    }
    (logits(&decoder, &batch) - float).square().mean(Kind::Double).double_value(&[])
}

#[test]
fn weights_alone() {
    let spec = QuantSpec::weights(3, 16);
    let plain = error(&Rtn { spec }, None);
    let methods: [&dyn Method; 4] =
        [&Mbq::new(spec), &Awq::new(spec), &Awq::full(spec), &Gptq { config: GptqConfig::new(3, 16) }];
    for method in methods {
        let found = error(method, None);
        assert!(found < 1.05 * plain, "{}: {found}, plain rounding {plain}", method.name());
        let pieces = error(method, Some(1));
        assert!((found - pieces).abs() < 0.05 * found, "{}: {found}, in pieces {pieces}", method.name());
    }
}

#[test]
fn weights_and_activations() {
    let spec = QuantSpec::with_activations(4, 8);
    let plain = error(&Rtn { spec }, None);
    for (method, worst) in [
        (&Mbq::new(spec) as &dyn Method, 1.05),
        (&Awq::new(spec), 1.05),
        // It makes activations easier whether or not weights can bear it; on random ones it is no gain.
        (&SmoothQuant::new(spec), 1.5),
    ] {
        let found = error(method, None);
        assert!(found < worst * plain, "{}: {found}, plain rounding {plain}", method.name());
    }
}

#[test]
fn samples_are_asked_for() {
    let mut decoder = decoder(2, Kind::Float);
    let names = names(&decoder);
    let spec = QuantSpec::weights(3, 16);
    let task = || Task {
        names: &names,
        batch: None,
        origin: Box::leak(Box::new(origin())),
        running: Running {
            out: None,
            chunk: None,
            max_memory: None,
            interrupt: Box::leak(Box::new(Interrupt::never())),
            progress: Box::leak(Box::new(|_| {})),
        },
    };
    assert!(
        Mbq::new(spec).quantize(&mut decoder, task()).unwrap_err().to_string().contains("mbq needs samples")
    );
    Rtn { spec }.quantize(&mut decoder, task()).unwrap();
}
