//! The reference checkpoint does what its card says, and an evaluation of it can fail.

use std::path::Path;

use megrez::Megrez;
use megrez::train::solved;
use nics_core::checkpoint::Checkpoint;
use nics_core::plugin::Plugins;
use nics_datasets::word_problems::Split;
use tch::{Device, Kind};

#[test]
fn the_reference_checkpoint_solves_what_it_never_saw_and_its_shuffled_weights_do_not() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/nano/megrez-text");
    let checkpoint = Checkpoint::open_dir(&dir).unwrap();
    let card = std::fs::read_to_string(dir.join("README.md")).unwrap();
    assert!(card.contains(&checkpoint.weights_hash().unwrap()), "the card is of other weights");
    let mut megrez = Megrez::load(&checkpoint, Device::Cpu, Kind::Float).unwrap();
    // Other problems than the card's 1,000.
    let accuracy = solved(&megrez, Split::Test, 100, 1).unwrap();
    assert!(accuracy >= 0.9, "{accuracy}");
    Plugins::default().weights("shuffle", "0", &mut megrez.decoder).unwrap();
    let accuracy = solved(&megrez, Split::Test, 100, 1).unwrap();
    assert!(accuracy < 0.05, "{accuracy}");
}
