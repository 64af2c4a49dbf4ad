//! Sequences that have ended and stay in the cache for prompts that begin like them, least recently used first.

use crate::seam::SeqId;

/// More than this many are not kept, whatever their size: a search looks at each.
const MOST: usize = 1024;

/// A kept sequence.
#[derive(Debug)]
pub(super) struct Entry {
    pub seq: SeqId,
    /// The id of every row.
    pub ids: Vec<u32>,
    /// Bytes that its rows take.
    pub bytes: usize,
}

/// The kept sequences. Their rows are the cache's; whoever takes an entry out closes or uses it.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Least recently used first.
    entries: Vec<Entry>,
    bytes: usize,
}

/// How many ids two sequences have in common from their first on.
pub(super) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Kept {
    /// Bytes of all.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The sequence that shares the most first ids with `prompt`, and how many; the most recently used of equals.
    pub fn best(&self, prompt: &[u32]) -> Option<(SeqId, usize)> {
        let shared = self.entries.iter().map(|e| (e.seq, common(&e.ids, prompt)));
        shared.max_by_key(|(_, n)| *n).filter(|(_, n)| *n > 0)
    }

    /// Rows of a kept sequence.
    pub fn rows(&self, seq: SeqId) -> usize {
        self.entries.iter().find(|e| e.seq == seq).map_or(0, |e| e.ids.len())
    }

    /// Counts a sequence as just used.
    pub fn touch(&mut self, seq: SeqId) {
        if let Some(i) = self.entries.iter().position(|e| e.seq == seq) {
            let entry = self.entries.remove(i);
            self.entries.push(entry);
        }
    }

    /// Takes a sequence out.
    pub fn remove(&mut self, seq: SeqId) -> Option<Entry> {
        let i = self.entries.iter().position(|e| e.seq == seq)?;
        let entry = self.entries.remove(i);
        self.bytes -= entry.bytes;
        Some(entry)
    }

    /// Takes the least recently used out, but not `spare`.
    pub fn evict(&mut self, spare: Option<SeqId>) -> Option<Entry> {
        let seq = self.entries.iter().map(|e| e.seq).find(|&seq| Some(seq) != spare)?;
        self.remove(seq)
    }

    /// Keeps a sequence, as the most recently used. Gives those that need not be kept for it: the ones that it begins
    /// with, itself when another begins with it, the oldest beyond the most that are kept.
    pub fn insert(&mut self, new: Entry) -> Vec<Entry> {
        if let Some(seq) = self.entries.iter().find(|e| e.ids.starts_with(&new.ids)).map(|e| e.seq) {
            self.touch(seq);
            return vec![new];
        }
        let covered: Vec<SeqId> =
            self.entries.iter().filter(|e| new.ids.starts_with(&e.ids)).map(|e| e.seq).collect();
        let mut superfluous: Vec<Entry> = covered.into_iter().filter_map(|seq| self.remove(seq)).collect();
        self.bytes += new.bytes;
        self.entries.push(new);
        if self.entries.len() > MOST {
            superfluous.extend(self.evict(None));
        }
        superfluous
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(seq: u64, ids: &[u32]) -> Entry {
        Entry { seq: SeqId(seq), ids: ids.to_vec(), bytes: 10 * ids.len() }
    }

    #[test]
    fn the_longest_shared_beginning_wins_and_the_least_recently_used_goes_first() {
        let mut kept = Kept::default();
        for (seq, ids) in [(1, &[1, 2, 3][..]), (2, &[1, 2, 9, 9]), (3, &[5])] {
            assert!(kept.insert(entry(seq, ids)).is_empty());
        }
        assert_eq!(kept.bytes(), 80);
        assert_eq!(kept.best(&[1, 2, 3, 4]), Some((SeqId(1), 3)));
        assert_eq!(kept.best(&[1, 2, 4]), Some((SeqId(2), 2)), "the most recently used of equals");
        assert_eq!(kept.best(&[7]), None);
        kept.touch(SeqId(1));
        assert_eq!(kept.evict(None).unwrap().seq, SeqId(2));
        assert_eq!(kept.evict(Some(SeqId(3))).unwrap().seq, SeqId(1));
        assert!(kept.evict(Some(SeqId(3))).is_none());
        assert_eq!(kept.bytes(), 10);
    }

    #[test]
    fn one_sequence_is_kept_for_all_that_it_begins_with() {
        let mut kept = Kept::default();
        kept.insert(entry(1, &[1, 2]));
        let gone = kept.insert(entry(2, &[1, 2, 3]));
        assert_eq!(gone.iter().map(|e| e.seq).collect::<Vec<_>>(), [SeqId(1)]);
        let gone = kept.insert(entry(3, &[1]));
        assert_eq!(gone.iter().map(|e| e.seq).collect::<Vec<_>>(), [SeqId(3)]);
        assert_eq!((kept.bytes(), kept.rows(SeqId(2))), (30, 3));
    }

    #[test]
    fn there_is_a_most() {
        let mut kept = Kept::default();
        for i in 0..MOST as u32 {
            assert!(kept.insert(entry(u64::from(i), &[i, i])).is_empty());
        }
        assert_eq!(kept.insert(entry(9999, &[77_777])).remove(0).seq, SeqId(0));
        assert_eq!(kept.bytes(), (MOST - 1) * 20 + 10);
    }
}
