//! Memory that all sequences of a cache share.
//!
//! A buddy allocator: a [`Block`] is `2^order` units, and lies at a multiple of its size. Halving the width of a page's codes
//! frees the second half of its block. Every page begins exact, in a block of the largest order, which halves that lie apart
//! cannot give. So where a block is missing though there is room for it, the pool moves what lies beside one free half into
//! another, which leaves a whole: it grows only when what is free in all is less than a block.
//!
//! Blocks come out of slabs, lowest first; a slab without a block goes back to the system, all but one.

use std::alloc::{Layout, handle_alloc_error};
use std::collections::{BTreeMap, BTreeSet};

use memmap2::MmapMut;
use nics_kernels::memory::prefer_huge_pages;

/// Bytes by which the pool grows at most at a time.
const LARGEST_SLAB: usize = 8 << 20;
/// The share of what there is by which it grows.
const GROWTH: usize = 16;
/// Slabs are whole pages of the system.
const SYSTEM_PAGE: usize = 4096;

/// A part of a [`Pool`], which gave it out and takes it back. The pool knows where it lies, and may move it.
#[derive(Debug)]
pub struct Block {
    id: u32,
    order: u8,
}

impl Block {
    /// It has `2^order` units.
    pub fn order(&self) -> u8 {
        self.order
    }
}

/// A slab, and the unit in it.
type Place = (u32, u32);

struct Slab {
    /// Its own mapping, so that it goes back to the system for sure; resident once it is written.
    memory: MmapMut,
    /// Units given out.
    used: u32,
}

/// The allocator.
pub struct Pool {
    /// Bytes of a unit.
    unit: usize,
    /// Order of the largest block.
    top: u8,
    slabs: Vec<Option<Slab>>,
    /// Free blocks of each order.
    free: Vec<BTreeSet<Place>>,
    /// Blocks given out, by place.
    taken: BTreeMap<Place, u32>,
    /// Where each block lies, by its id; ids of blocks that were given back are used again.
    places: Vec<Place>,
    unused_ids: Vec<u32>,
    /// Bytes of all slabs.
    allocated: usize,
    /// Units given out.
    used: usize,
}

impl Pool {
    /// A pool whose smallest blocks have `unit` bytes and the largest `unit · 2^top`.
    pub fn new(unit: usize, top: u8) -> Self {
        Self {
            unit: unit.max(1),
            top,
            slabs: Vec::new(),
            free: vec![BTreeSet::new(); usize::from(top) + 1],
            taken: BTreeMap::new(),
            places: Vec::new(),
            unused_ids: Vec::new(),
            allocated: 0,
            used: 0,
        }
    }

    /// A block of `2^order` units; what it holds is arbitrary.
    pub fn take(&mut self, order: u8) -> Block {
        let (mut found, (slab, at)) = self.smallest(order);
        self.free[usize::from(found)].remove(&(slab, at));
        while found > order {
            found -= 1;
            self.free[usize::from(found)].insert((slab, at + (1 << found)));
        }
        let id = self.unused_ids.pop().unwrap_or_else(|| {
            self.places.push((slab, at));
            (self.places.len() - 1) as u32
        });
        self.places[id as usize] = (slab, at);
        self.taken.insert((slab, at), id);
        self.count(slab, order, true);
        Block { id, order }
    }

    /// Takes a block back.
    #[allow(clippy::needless_pass_by_value)] // Given back, it is gone.
    pub fn give(&mut self, block: Block) {
        let place = self.place(&block);
        self.taken.remove(&place);
        self.unused_ids.push(block.id);
        self.set_free(place, block.order);
    }

    /// Takes the second half of a block back; what the first half holds stays.
    pub fn halve(&mut self, block: &mut Block) {
        block.order -= 1;
        let (slab, at) = self.place(block);
        self.set_free((slab, at + (1 << block.order)), block.order);
    }

    /// Counts units as free, one with the free ones beside them.
    fn set_free(&mut self, (slab, mut at): Place, mut order: u8) {
        self.count(slab, order, false);
        while order < self.top && self.free[usize::from(order)].remove(&(slab, at ^ (1 << order))) {
            at &= !(1 << order);
            order += 1;
        }
        self.free[usize::from(order)].insert((slab, at));
        self.release(slab);
    }

    /// Makes one free block of two of an order below `order`: what lies beside the later one moves into the earlier one.
    /// `false` where no order has two.
    fn merge(&mut self, order: u8) -> bool {
        let two = |free: &BTreeSet<Place>| Some((*free.first()?, *free.last().filter(|_| free.len() > 1)?));
        let Some((order, (to, hole))) = (0..order).find_map(|o| Some((o, two(&self.free[usize::from(o)])?)))
        else {
            return false;
        };
        let from = (hole.0, hole.1 ^ (1 << order));
        self.relocate(from, to, order);
        true
    }

    /// Moves all that lies in the `2^order` units at `from` to the free block at `to`, and frees those units.
    fn relocate(&mut self, from: Place, to: Place, order: u8) {
        let units = 1u32 << order;
        self.free[usize::from(order)].remove(&to);
        let moved = |(_, at): Place| (to.0, to.1 + (at - from.1));
        let inside = from..(from.0, from.1 + units);
        let blocks: Vec<(Place, u32)> =
            self.taken.range(inside.clone()).map(|(place, id)| (*place, *id)).collect();
        for (place, id) in blocks {
            self.taken.remove(&place);
            self.taken.insert(moved(place), id);
            self.places[id as usize] = moved(place);
        }
        let mut used = units;
        for smaller in 0..order {
            let free = &mut self.free[usize::from(smaller)];
            let places: Vec<Place> = free.range(inside.clone()).copied().collect();
            for place in places {
                free.remove(&place);
                free.insert(moved(place));
                used -= 1 << smaller;
            }
        }
        let bytes = self.slice(from, order).to_vec();
        self.slice_mut(to, order).copy_from_slice(&bytes);
        for (slab, more) in [(to.0, true), (from.0, false)] {
            if let Some(Some(slab)) = self.slabs.get_mut(slab as usize) {
                slab.used = if more { slab.used + used } else { slab.used - used };
            }
        }
        // `set_free` counts whole blocks; these units were not all used.
        if let Some(Some(slab)) = self.slabs.get_mut(from.0 as usize) {
            slab.used += units;
        }
        self.used += units as usize;
        self.set_free(from, order);
    }

    fn place(&self, block: &Block) -> Place {
        self.places[block.id as usize]
    }

    fn slice(&self, (slab, at): Place, order: u8) -> &[u8] {
        let from = at as usize * self.unit;
        self.slabs[slab as usize].as_ref().map_or(&[], |slab| &slab.memory[from..from + (self.unit << order)])
    }

    fn slice_mut(&mut self, (slab, at): Place, order: u8) -> &mut [u8] {
        let from = at as usize * self.unit;
        let to = from + (self.unit << order);
        self.slabs[slab as usize].as_mut().map_or(&mut [], |slab| &mut slab.memory[from..to])
    }

    /// What a block holds.
    pub fn bytes(&self, block: &Block) -> &[u8] {
        self.slice(self.place(block), block.order)
    }

    /// What a block holds, for writing.
    pub fn bytes_mut(&mut self, block: &Block) -> &mut [u8] {
        self.slice_mut(self.place(block), block.order)
    }

    /// Bytes of a block of this order.
    pub fn size(&self, order: u8) -> usize {
        self.unit << order
    }

    /// Bytes that the pool holds.
    pub fn allocated(&self) -> usize {
        self.allocated
    }

    /// Bytes given out.
    pub fn used(&self) -> usize {
        self.used * self.unit
    }

    fn count(&mut self, slab: u32, order: u8, taken: bool) {
        let units = 1u32 << order;
        if let Some(Some(slab)) = self.slabs.get_mut(slab as usize) {
            if taken {
                slab.used += units;
                self.used += units as usize;
            } else {
                slab.used -= units;
                self.used -= units as usize;
            }
        }
    }

    /// The free block of the least order from `order` on, the lowest of those. Where there is none, free ones are merged, and
    /// the pool grows when they do not suffice.
    fn smallest(&mut self, order: u8) -> (u8, Place) {
        loop {
            let found = (order..=self.top).find_map(|o| Some((o, *self.free[usize::from(o)].first()?)));
            match found {
                Some(found) => return found,
                None if self.merge(order) => {}
                None => self.grow(),
            }
        }
    }

    /// A slab more: a part of what there is, at least one block of the largest order.
    fn grow(&mut self) {
        let largest = self.size(self.top);
        let blocks = (self.allocated / GROWTH).min(LARGEST_SLAB) / largest;
        let bytes = (blocks.max(1) * largest).next_multiple_of(SYSTEM_PAGE);
        let Ok(memory) = MmapMut::map_anon(bytes) else {
            // As for any other memory that the system does not give.
            let layout = Layout::from_size_align(bytes, SYSTEM_PAGE).unwrap_or(Layout::new::<u8>());
            handle_alloc_error(layout)
        };
        if bytes >= LARGEST_SLAB / 4 {
            prefer_huge_pages(memory.as_ptr(), bytes);
        }
        let slab = Slab { memory, used: 0 };
        let index = self.slabs.iter().position(Option::is_none).unwrap_or(self.slabs.len());
        if index == self.slabs.len() {
            self.slabs.push(None);
        }
        self.slabs[index] = Some(slab);
        self.allocated += bytes;
        let blocks = self.whole_blocks(index as u32, bytes);
        self.free[usize::from(self.top)].extend(blocks);
    }

    /// The largest blocks of a slab of so many bytes.
    fn whole_blocks(&self, slab: u32, bytes: usize) -> impl Iterator<Item = (u32, u32)> + use<> {
        let top = self.top;
        (0..(bytes / self.size(top)) as u32).map(move |i| (slab, i << top))
    }

    /// Gives a slab without blocks back to the system, unless it is the only such one.
    fn release(&mut self, slab: u32) {
        let empty = |s: &Option<Slab>| s.as_ref().is_some_and(|s| s.used == 0);
        if !empty(&self.slabs[slab as usize]) || self.slabs.iter().filter(|s| empty(s)).count() < 2 {
            return;
        }
        if let Some(gone) = self.slabs[slab as usize].take() {
            let bytes = gone.memory.len();
            self.allocated -= bytes;
            for block in self.whole_blocks(slab, bytes) {
                self.free[usize::from(self.top)].remove(&block);
            }
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("unit", &self.unit)
            .field("top", &self.top)
            .field("allocated", &self.allocated)
            .field("used", &self.used())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn narrow_blocks_move_together() {
        let mut pool = Pool::new(4096, 3);
        let mut blocks: Vec<Block> = Vec::new();
        // As pages do: each begins in a largest block and is halved down to the smallest.
        for i in 0..800u32 {
            let mut block = pool.take(3);
            pool.bytes_mut(&block)[..4].copy_from_slice(&i.to_le_bytes());
            for _ in 0..3 {
                pool.halve(&mut block);
            }
            blocks.push(block);
        }
        assert!(pool.allocated() as f64 <= 1.1 * pool.used() as f64, "{pool:?}");
        // And a layer whose pages are halved together.
        let mut layer: Vec<Block> = (0..100).map(|_| pool.take(3)).collect();
        for _ in 0..3 {
            for block in &mut layer {
                pool.halve(block);
            }
        }
        // Seven eighths of its memory are there for others.
        let before = pool.allocated();
        let more: Vec<Block> = (0..87).map(|_| pool.take(3)).collect();
        assert_eq!(pool.allocated(), before);
        for block in more {
            pool.give(block);
        }
        let first = |block: &Block| u32::from_le_bytes(pool.bytes(block)[..4].try_into().unwrap());
        assert!(blocks.iter().enumerate().all(|(i, block)| first(block) == i as u32));
    }

    proptest! {
        #[test]
        fn blocks_never_overlap_and_all_come_back(
            unit in prop::sample::select(vec![1usize, 24, 64, 4096]),
            steps in prop::collection::vec((0u8..4, any::<prop::sample::Index>(), 0u8..3), 1..200),
        ) {
            let mut pool = Pool::new(unit, 3);
            let mut held: Vec<(Block, u8)> = Vec::new();
            let mut most = 0;
            for (i, (order, which, what)) in steps.into_iter().enumerate() {
                if what == 0 && !held.is_empty() {
                    let (block, _) = held.swap_remove(which.index(held.len()));
                    pool.give(block);
                } else if what == 1 && !held.is_empty() {
                    let at = which.index(held.len());
                    if held[at].0.order > 0 {
                        pool.halve(&mut held[at].0);
                    }
                } else {
                    let block = pool.take(order);
                    pool.bytes_mut(&block).fill(i as u8);
                    prop_assert_eq!(pool.bytes(&block).len(), unit << order);
                    held.push((block, i as u8));
                }
                for (block, mark) in &held {
                    prop_assert!(pool.bytes(block).iter().all(|b| b == mark));
                }
                let used: usize = held.iter().map(|(b, _)| pool.size(b.order)).sum();
                prop_assert_eq!(pool.used(), used);
                prop_assert!(pool.allocated() >= used);
                most = most.max(used);
                // It never holds more than what was there at once, a block more, and a step of growth.
                let largest = pool.size(3).next_multiple_of(SYSTEM_PAGE);
                prop_assert!(pool.allocated() <= (most + 2 * largest) * (GROWTH + 1) / GROWTH + SYSTEM_PAGE, "{pool:?}");
            }
            for (block, _) in held {
                pool.give(block);
            }
            prop_assert_eq!(pool.used(), 0);
            prop_assert!(pool.slabs.iter().flatten().count() <= 1);
            // What is left is whole again.
            prop_assert!(pool.free[..3].iter().all(BTreeSet::is_empty));
        }
    }
}
