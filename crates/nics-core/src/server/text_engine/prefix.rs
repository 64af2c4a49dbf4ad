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

/// Which rows of one sequence another may start from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rule {
    /// All that they have in common.
    Any,
    /// Those that the same calls of the model give in both: whole chunks of this many rows, and the last, shorter one
    /// where both prompts end together.
    Chunks(usize),
}

impl Rule {
    /// How many rows a prompt of which `mine` are read before its last one may take over, when it has its first `shared`
    /// ids in common with a sequence that has `theirs` to offer.
    pub fn rows(self, shared: usize, theirs: usize, mine: usize) -> usize {
        let rows = shared.min(theirs).min(mine);
        match self {
            Self::Chunks(chunk) if rows < mine || mine < theirs => rows - rows % chunk,
            Self::Chunks(_) | Self::Any => rows,
        }
    }

    /// Rows of a sequence that others may start from: `all` of them, of which `prompt` were read before the prompt's last.
    pub fn offered(self, all: usize, prompt: usize) -> usize {
        match self {
            Self::Any => all,
            Self::Chunks(_) => all.min(prompt),
        }
    }
}

/// The rows of a kept sequence that a prompt can start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Match {
    pub seq: SeqId,
    pub rows: usize,
    /// The prompt begins with all ids of the sequence, which is of no more use once the prompt's own is there.
    pub covers: bool,
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

    /// The sequence that gives `prompt` the most rows, if that are `min` (at least 1); the most recently used of equals.
    pub fn best(&self, prompt: &[u32], rule: Rule, min: usize) -> Option<Match> {
        let of = |e: &Entry| {
            let shared = common(&e.ids, prompt);
            let rows = rule.rows(shared, e.ids.len(), prompt.len() - 1);
            Match { seq: e.seq, rows, covers: shared == e.ids.len() }
        };
        self.entries.iter().map(of).max_by_key(|m| m.rows).filter(|m| m.rows >= min.max(1))
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
        let best = |prompt: &[u32], min| kept.best(prompt, Rule::Any, min);
        let found = |seq, rows, covers| Some(Match { seq: SeqId(seq), rows, covers });
        assert_eq!(best(&[1, 2, 3, 4], 0), found(1, 3, true));
        assert_eq!(
            best(&[1, 2, 3], 0),
            found(2, 2, false),
            "the last token is computed; the most recently used of equals"
        );
        assert_eq!(best(&[5], 0), None);
        assert_eq!(best(&[7, 7], 0), None);
        assert_eq!((best(&[1, 2, 3, 4], 3).is_some(), best(&[1, 2, 3, 4], 4)), (true, None));
        kept.touch(SeqId(1));
        assert_eq!(kept.evict(None).unwrap().seq, SeqId(2));
        assert_eq!(kept.evict(Some(SeqId(3))).unwrap().seq, SeqId(1));
        assert!(kept.evict(Some(SeqId(3))).is_none());
        assert_eq!(kept.bytes(), 10);
    }

    #[test]
    fn rows_are_shared_where_the_same_calls_compute_them() {
        // Shared ids, rows that the other offers, rows before the prompt's last: by chunks of 8, and by any.
        for (shared, theirs, mine, chunks, any) in [
            (20, 30, 40, 16, 20), // They part within a chunk.
            (24, 30, 40, 24, 24), // They part at its end.
            (30, 30, 40, 24, 30), // The other ends within a chunk that goes on here.
            (40, 40, 30, 24, 30), // This one ends within a chunk that goes on there.
            (30, 30, 30, 30, 30), // Both end together.
            (29, 30, 30, 24, 29), // They would, but part before.
            (32, 32, 32, 32, 32),
            (5, 5, 5, 5, 5),
            (5, 9, 9, 0, 5),
        ] {
            assert_eq!(Rule::Chunks(8).rows(shared, theirs, mine), chunks, "{shared}, {theirs}, {mine}");
            assert_eq!(Rule::Any.rows(shared, theirs, mine), any, "{shared}, {theirs}, {mine}");
        }
        assert_eq!((Rule::Any.offered(50, 30), Rule::Chunks(8).offered(50, 30)), (50, 30));
        assert_eq!(Rule::Chunks(8).offered(16, 30), 16, "it was still being read");
    }

    #[test]
    fn one_sequence_is_kept_for_all_that_it_begins_with() {
        let mut kept = Kept::default();
        kept.insert(entry(1, &[1, 2]));
        let gone = kept.insert(entry(2, &[1, 2, 3]));
        assert_eq!(gone.iter().map(|e| e.seq).collect::<Vec<_>>(), [SeqId(1)]);
        let gone = kept.insert(entry(3, &[1]));
        assert_eq!(gone.iter().map(|e| e.seq).collect::<Vec<_>>(), [SeqId(3)]);
        assert_eq!(kept.bytes(), 30);
        assert_eq!(kept.remove(SeqId(2)).unwrap().ids, [1, 2, 3]);
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
