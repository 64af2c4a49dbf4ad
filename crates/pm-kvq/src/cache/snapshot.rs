//! A layer as named tensors: `N.books` and `N.positions` (int64), and the raw bytes `N.sink`, `N.pages` and `N.parameters`.

use nics_core::seam::Snapshot;
use tch::{Kind, Tensor};

use super::paged::Layer;
use super::positions::Positions;
use super::store::{Layout, Pools, Store};
use crate::ledger::{Ledger, Rules};
use crate::{Error, Result};

const BYTES: [&str; 3] = ["sink", "pages", "parameters"];

/// Adds the tensors of layer `i`.
pub fn save(i: usize, layer: &Layer, pools: &Pools, into: &mut Vec<(String, Tensor)>) -> Result<()> {
    let bytes = layer.store.raw(pools);
    into.push((format!("{i}.books"), Tensor::f_from_slice(&layer.ledger.to_numbers())?));
    into.push((format!("{i}.positions"), Tensor::f_from_slice(&layer.positions.runs())?));
    for (name, bytes) in BYTES.into_iter().zip(bytes) {
        into.push((format!("{i}.{name}"), Tensor::f_from_slice(&bytes)?));
    }
    Ok(())
}

/// Layer `i` of a snapshot.
///
/// # Errors
/// A tensor that is missing, of another dtype or length, or at odds with the rules.
pub fn restored(
    i: usize,
    snapshot: &Snapshot,
    pools: &mut Pools,
    layout: &Layout,
    rules: &Rules,
) -> Result<Layer> {
    let damaged = |what: &str| Error::Input(format!("the snapshot's {i}.{what} is missing or damaged"));
    let find = |what: &str, kind: Kind| {
        let name = format!("{i}.{what}");
        let found = snapshot.tensors.iter().find(|(n, t)| *n == name && t.kind() == kind && t.dim() == 1);
        found.map(|(_, t)| t).ok_or_else(|| damaged(what))
    };
    let numbers = |what: &str| Vec::<i64>::try_from(find(what, Kind::Int64)?).map_err(|_| damaged(what));
    let ledger = Ledger::of_numbers(rules, &numbers("books")?).ok_or_else(|| damaged("books"))?;
    let positions = Positions::of_runs(&numbers("positions")?).ok_or_else(|| damaged("positions"))?;
    if positions.len() != ledger.tokens() || positions.len() > snapshot.max_tokens {
        return Err(damaged("positions"));
    }
    let bytes = |what: &str| Vec::<u8>::try_from(find(what, Kind::Uint8)?).map_err(|_| damaged(what));
    let raw = [bytes(BYTES[0])?, bytes(BYTES[1])?, bytes(BYTES[2])?];
    let widths: Vec<_> = ledger.pages().iter().map(|page| page.bits).collect();
    let parts = [&raw[0][..], &raw[1], &raw[2]];
    if parts[0].is_empty() != (ledger.sink() == 0) {
        return Err(damaged(BYTES[0]));
    }
    let store = Store::of_raw(pools, layout, &widths, parts).ok_or_else(|| damaged("pages"))?;
    Ok(Layer { ledger, store, positions })
}
