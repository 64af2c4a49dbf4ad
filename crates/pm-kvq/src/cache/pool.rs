//! Memory that all sequences of a cache share.
//!
//! A buddy allocator: a [`Block`] is `2^order` units, and lies at a multiple of its size. Halving the width of a page's codes
//! frees the second half of its block. Every page begins exact, in a block of the largest order, so narrow pages have to
//! move together to leave such blocks free: a block that is halved goes where a half was left free before.
//!
//! Blocks come out of slabs, lowest first; a slab without a block goes back to the system, all but one.

use std::alloc::{Layout, handle_alloc_error};
use std::collections::BTreeSet;

use memmap2::MmapMut;
use nics_kernels::memory::prefer_huge_pages;

/// Bytes by which the pool grows at most at a time.
const LARGEST_SLAB: usize = 8 << 20;
/// Slabs are whole pages of the system.
const SYSTEM_PAGE: usize = 4096;

/// A part of a [`Pool`], which gave it out and takes it back.
#[derive(Debug)]
pub struct Block {
    slab: u32,
    /// In units.
    at: u32,
    order: u8,
}

impl Block {
    /// It has `2^order` units.
    pub fn order(&self) -> u8 {
        self.order
    }
}

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
    /// Free blocks of each order, by slab and place.
    free: Vec<BTreeSet<(u32, u32)>>,
    /// Bytes of all slabs.
    allocated: usize,
    /// Units given out.
    used: usize,
}

impl Pool {
    /// A pool whose smallest blocks have `unit` bytes and the largest `unit · 2^top`.
    pub fn new(unit: usize, top: u8) -> Self {
        let free = vec![BTreeSet::new(); usize::from(top) + 1];
        Self { unit: unit.max(1), top, slabs: Vec::new(), free, allocated: 0, used: 0 }
    }

    /// A block of `2^order` units; what it holds is arbitrary.
    pub fn take(&mut self, order: u8) -> Block {
        let (found, place) = self.smallest(order);
        self.carve(found, place, order)
    }

    /// The beginning of a free block of order `found`.
    fn carve(&mut self, mut found: u8, (slab, at): (u32, u32), order: u8) -> Block {
        self.free[usize::from(found)].remove(&(slab, at));
        while found > order {
            found -= 1;
            self.free[usize::from(found)].insert((slab, at + (1 << found)));
        }
        let block = Block { slab, at, order };
        self.count(&block, true);
        block
    }

    /// Takes a block back.
    #[allow(clippy::needless_pass_by_value)] // Given back, it is gone.
    pub fn give(&mut self, block: Block) {
        self.count(&block, false);
        let Block { slab, mut at, mut order } = block;
        while order < self.top && self.free[usize::from(order)].remove(&(slab, at ^ (1 << order))) {
            at &= !(1 << order);
            order += 1;
        }
        self.free[usize::from(order)].insert((slab, at));
        self.release(slab);
    }

    /// Takes the second half of a block back. What the first half holds stays, but may move with the block.
    pub fn halve(&mut self, block: &mut Block) {
        block.order -= 1;
        let second = Block { slab: block.slab, at: block.at + (1 << block.order), order: block.order };
        self.give(second);
        if let Some((order, place)) = self.better_place(block) {
            let place = self.carve(order, place, block.order);
            self.copy(block, &place);
            self.give(std::mem::replace(block, place));
        }
    }

    /// A free block, and its order, that a block just halved should move to: one of its size, which is some other block's
    /// second half, or a part of a larger one that lies below it.
    fn better_place(&self, block: &Block) -> Option<(u8, (u32, u32))> {
        let own = (block.slab, block.at);
        let own_second = (block.slab, block.at ^ (1 << block.order));
        let fitting = self.free[usize::from(block.order)].iter().find(|place| **place != own_second);
        if let Some(place) = fitting {
            return Some((block.order, *place));
        }
        let below = |order: &u8| self.free[usize::from(*order)].first().is_some_and(|place| *place < own);
        let order = (block.order + 1..self.top).find(below)?;
        Some((order, *self.free[usize::from(order)].first()?))
    }

    fn copy(&mut self, from: &Block, to: &Block) {
        let bytes = self.bytes(from).to_vec();
        self.bytes_mut(to).copy_from_slice(&bytes);
    }

    /// What a block holds.
    pub fn bytes(&self, block: &Block) -> &[u8] {
        let (from, len) = self.range(block);
        self.slabs[block.slab as usize].as_ref().map_or(&[], |slab| &slab.memory[from..from + len])
    }

    /// What a block holds, for writing.
    pub fn bytes_mut(&mut self, block: &Block) -> &mut [u8] {
        let (from, len) = self.range(block);
        self.slabs[block.slab as usize].as_mut().map_or(&mut [], |slab| &mut slab.memory[from..from + len])
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

    fn range(&self, block: &Block) -> (usize, usize) {
        (block.at as usize * self.unit, self.unit << block.order)
    }

    fn count(&mut self, block: &Block, taken: bool) {
        let units = 1u32 << block.order;
        if let Some(Some(slab)) = self.slabs.get_mut(block.slab as usize) {
            if taken {
                slab.used += units;
                self.used += units as usize;
            } else {
                slab.used -= units;
                self.used -= units as usize;
            }
        }
    }

    /// The free block of the least order from `order` on, the lowest of those; grows the pool when there is none.
    fn smallest(&mut self, order: u8) -> (u8, (u32, u32)) {
        loop {
            let found = (order..=self.top).find_map(|o| Some((o, *self.free[usize::from(o)].first()?)));
            match found {
                Some(found) => return found,
                None => self.grow(),
            }
        }
    }

    /// A slab more: a quarter of what there is, at least one block of the largest order.
    fn grow(&mut self) {
        let largest = self.size(self.top);
        let bytes = (self.allocated / 4).min(LARGEST_SLAB).max(largest).next_multiple_of(SYSTEM_PAGE);
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
        assert!(pool.allocated() as f64 <= 1.3 * pool.used() as f64, "{pool:?}");
        // And a layer whose pages are halved together.
        let mut layer: Vec<Block> = (0..100).map(|_| pool.take(3)).collect();
        for _ in 0..3 {
            for block in &mut layer {
                pool.halve(block);
            }
        }
        let free: usize = pool.free[3].len();
        assert!(free >= 85, "{free} of 100 largest blocks are free again");
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
