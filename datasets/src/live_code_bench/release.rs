//! Which problems: releases and days.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use time::{Date, Month};

/// Which files of the dataset: `v5` is one of them, `v4_v5` a range, `release_v5` all up to one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release(RangeInclusive<u8>);

/// The newest file that is known.
const LAST: u8 = 6;

impl Release {
    /// The names of its files, oldest first.
    pub fn files(&self) -> impl Iterator<Item = String> {
        self.0.clone().map(|n| if n == 1 { "test.jsonl".to_owned() } else { format!("test{n}.jsonl") })
    }
}

impl FromStr for Release {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |name: &str| name.strip_prefix('v')?.parse().ok().filter(|n| (1..=LAST).contains(n));
        let range = match text.strip_prefix("release_") {
            Some("latest") => Some(1..=LAST),
            Some(to) => number(to).map(|to| 1..=to),
            None => match text.split_once('_') {
                Some((from, to)) => number(from).zip(number(to)).map(|(from, to)| from..=to),
                None => number(text).map(|n| n..=n),
            },
        };
        range.filter(|r| !r.is_empty()).map(Self).ok_or_else(|| {
            format!("{text:?} is no release; expected e.g. v6, v4_v5, release_v5 or release_latest (v1 to v{LAST})")
        })
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (*self.0.start(), *self.0.end()) {
            (from, to) if from == to => write!(f, "v{from}"),
            (1, to) => write!(f, "release_v{to}"),
            (from, to) => write!(f, "v{from}_v{to}"),
        }
    }
}

/// Days of contests, both ends within; a problem that is younger than a model cannot have been learnt by heart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Window {
    /// The first day.
    pub from: Option<Date>,
    /// The last day.
    pub to: Option<Date>,
}

impl Window {
    /// Whether a day lies within.
    pub fn holds(&self, day: Date) -> bool {
        self.from.is_none_or(|from| from <= day) && self.to.is_none_or(|to| day <= to)
    }
}

/// A day written `2024-08-01`.
///
/// # Errors
/// A text for people.
pub fn day(text: &str) -> Result<Date, String> {
    let read = || {
        let (year, rest) = text.split_once('-')?;
        let (month, day) = rest.split_once('-')?;
        if [year.len(), month.len(), day.len()] != [4, 2, 2] {
            return None;
        }
        let month = Month::try_from(month.parse::<u8>().ok()?).ok()?;
        Date::from_calendar_date(year.parse().ok()?, month, day.parse().ok()?).ok()
    };
    read().ok_or_else(|| format!("{text:?} is no day, expected one such as 2024-08-01"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_files() {
        let files = |name: &str| name.parse::<Release>().unwrap().files().collect::<Vec<_>>();
        assert_eq!(files("v1"), ["test.jsonl"]);
        assert_eq!(files("v4_v5"), ["test4.jsonl", "test5.jsonl"]);
        assert_eq!(files("release_v2"), ["test.jsonl", "test2.jsonl"]);
        assert_eq!(files("release_latest").len(), 6);
        for name in ["v6", "v4_v5", "release_v3", "v1"] {
            assert_eq!(name.parse::<Release>().unwrap().to_string(), name);
        }
        for wrong in ["", "v0", "v7", "v5_v4", "release", "release_v9", "latest", "4", "v4-v5"] {
            assert!(wrong.parse::<Release>().unwrap_err().contains("expected"), "{wrong}");
        }
    }

    #[test]
    fn windows_hold_both_ends() {
        let (first, last) = (day("2024-08-01").unwrap(), day("2025-01-31").unwrap());
        let window = Window { from: Some(first), to: Some(last) };
        assert!(window.holds(first) && window.holds(last));
        assert!(!window.holds(day("2024-07-31").unwrap()) && !window.holds(day("2025-02-01").unwrap()));
        assert!(Window::default().holds(first));
        for wrong in ["2024-8-1", "2024-13-01", "2025-02-29", "yesterday", "2024-08-01T00:00:00"] {
            assert!(day(wrong).is_err(), "{wrong}");
        }
    }
}
