//! English wordings, people and items.

use super::{Plan, Wording};

pub(super) const PEOPLE: &[&str] = &[
    "Emma", "Liam", "Olivia", "Noah", "Ava", "Lucas", "Mia", "Ethan", "Sophia", "Jack", "Grace", "Leo",
    "Nora", "Sam", "Zoe", "Ben", "Ruby", "Tom", "Lily", "Max", "Ella", "Oscar", "Anna", "Henry",
];

/// Measure word (none in English) and plural.
pub(super) const ITEMS: &[(&str, &str)] = &[
    ("", "apples"),
    ("", "pencils"),
    ("", "stickers"),
    ("", "marbles"),
    ("", "books"),
    ("", "cookies"),
    ("", "stamps"),
    ("", "cards"),
    ("", "shells"),
    ("", "balloons"),
    ("", "oranges"),
    ("", "buttons"),
    ("", "coins"),
    ("", "flowers"),
    ("", "toys"),
    ("", "beads"),
    ("", "candies"),
    ("", "pears"),
    ("", "cups"),
    ("", "notebooks"),
    ("", "eggs"),
    ("", "ribbons"),
    ("", "blocks"),
    ("", "photos"),
];

pub(super) const WORDINGS: [Wording; 30] = [
    (Plan::Add, "{n} has {a} {i} and buys {b} more. How many {i} does {n} have now?", "{n} now has {1} {i}."),
    (
        Plan::Add,
        "{n} found {a} {i} and {m} found {b} {i}. How many {i} did they find together?",
        "Together they found {1} {i}.",
    ),
    (
        Plan::Sub,
        "{n} had {a} {i} and gave {b} of them to {m}. How many {i} does {n} have left?",
        "{n} has {1} {i} left.",
    ),
    (
        Plan::Sub,
        "{n} has {a} {i} and {m} has {b} {i}. How many more {i} does {n} have than {m}?",
        "{n} has {1} more {i}.",
    ),
    (
        Plan::Mul,
        "There are {a} boxes with {b} {i} in each box. How many {i} are there in all?",
        "In all there are {1} {i}.",
    ),
    (
        Plan::Mul,
        "{n} packs {b} {i} every day. How many {i} does {n} pack in {a} days?",
        "In {a} days {n} packs {1} {i}.",
    ),
    (
        Plan::Div,
        "{n} shares {a} {i} equally among {b} friends. How many {i} does each friend get?",
        "Each friend gets {1} {i}.",
    ),
    (Plan::Div, "{n} puts {a} {i} into bags of {b}. How many bags does {n} fill?", "{n} fills {1} bags."),
    (
        Plan::AddSub,
        "{n} had {a} {i}, bought {b} more and then gave away {c}. How many {i} are left?",
        "First {n} had {1} {i}.\nThen {2} {i} are left.",
    ),
    (
        Plan::AddSub,
        "A shop had {a} {i}. It received {b} {i} and sold {c}. How many {i} does the shop have now?",
        "With the new ones there were {1} {i}.\nAfter the sale there are {2} {i}.",
    ),
    (
        Plan::MulAdd,
        "{n} has {a} boxes of {b} {i} and {c} loose {i}. How many {i} does {n} have in all?",
        "The boxes hold {1} {i}.\nIn all there are {2} {i}.",
    ),
    (
        Plan::MulAdd,
        "{n} made {b} {i} a day for {a} days, and {m} made {c} {i}. How many {i} did they make together?",
        "{n} made {1} {i}.\nTogether they made {2} {i}.",
    ),
    (
        Plan::MulSub,
        "{n} bought {a} packs of {b} {i} and used {c} of them. How many {i} are left?",
        "The packs held {1} {i}.\nNow {2} {i} are left.",
    ),
    (
        Plan::MulSub,
        "A school ordered {a} crates with {b} {i} each, but {c} {i} were broken. How many {i} were fine?",
        "The school ordered {1} {i}.\nOf these {2} {i} were fine.",
    ),
    (
        Plan::SumMul,
        "Each bag holds {a} red {i} and {b} blue {i}. How many {i} are in {c} bags?",
        "One bag holds {1} {i}.\nThe bags hold {2} {i}.",
    ),
    (
        Plan::SumMul,
        "Every day {n} sells {a} {i} and {m} sells {b} {i}. How many {i} do they sell in {c} days?",
        "In one day they sell {1} {i}.\nIn {c} days they sell {2} {i}.",
    ),
    (
        Plan::DiffMul,
        "A pen costs {a} dollars. With a coupon it is {b} dollars cheaper. How much do {c} pens cost with the coupon?",
        "One pen costs {1} dollars.\nThe pens cost {2} dollars.",
    ),
    (
        Plan::DiffMul,
        "{n} earns {a} dollars a day and spends {b} dollars a day. How many dollars does {n} save in {c} days?",
        "Each day {n} saves {1} dollars.\nIn {c} days {n} saves {2} dollars.",
    ),
    (
        Plan::SumDiv,
        "{n} has {a} {i} and {m} has {b} {i}. They share all of them equally among {c} children. How many {i} does each child get?",
        "Together they have {1} {i}.\nEach child gets {2} {i}.",
    ),
    (
        Plan::SumDiv,
        "A farm packs {a} red {i} and {b} green {i} into {c} equal baskets. How many {i} go into each basket?",
        "The farm packs {1} {i}.\nEach basket holds {2} {i}.",
    ),
    (
        Plan::LessMul,
        "{n} has {a} dollars and buys {b} tickets for {c} dollars each. How many dollars are left?",
        "The tickets cost {1} dollars.\nThen {2} dollars are left.",
    ),
    (
        Plan::LessMul,
        "A book has {a} pages. {n} reads {c} pages a day for {b} days. How many pages are left?",
        "{n} reads {1} pages.\nThen {2} pages are left.",
    ),
    (
        Plan::MulDiv,
        "{n} has {a} bags of {b} {i} and shares all of them equally among {c} friends. How many {i} does each friend get?",
        "The bags hold {1} {i}.\nEach friend gets {2} {i}.",
    ),
    (
        Plan::MulDiv,
        "There are {a} rows of {b} {i}. They are put into {c} equal piles. How many {i} are in each pile?",
        "The rows have {1} {i}.\nEach pile has {2} {i}.",
    ),
    (
        Plan::TwoMul,
        "{n} buys {a} small boxes of {b} {i} and {c} large boxes of {d} {i}. How many {i} does {n} buy?",
        "The small boxes hold {1} {i}.\nThe large boxes hold {2} {i}.\nIn all {n} buys {3} {i}.",
    ),
    (
        Plan::TwoMul,
        "A ticket costs {b} dollars for an adult and {d} dollars for a child. How much do {a} adults and {c} children pay?",
        "The adults pay {1} dollars.\nThe children pay {2} dollars.\nIn all they pay {3} dollars.",
    ),
    (
        Plan::SumMulSub,
        "Every day {n} makes {a} {i} and {m} makes {b} {i}. After {c} days they give away {d} {i}. How many {i} are left?",
        "In one day they make {1} {i}.\nIn {c} days they make {2} {i}.\nThen {3} {i} are left.",
    ),
    (
        Plan::SumMulSub,
        "A set has {a} long {i} and {b} short {i}. {n} buys {c} sets and loses {d} {i}. How many {i} does {n} have?",
        "One set has {1} {i}.\nThe sets have {2} {i}.\nThen {n} has {3} {i}.",
    ),
    (
        Plan::SumDivAdd,
        "{a} red {i} and {b} blue {i} are shared equally by {c} children. {n}, one of them, already had {d}. How many {i} does {n} have now?",
        "There are {1} {i} to share.\nEach child gets {2} {i}.\nNow {n} has {3} {i}.",
    ),
    (
        Plan::SumDivAdd,
        "{n} and {m} pick {a} and {b} {i} and fill {c} equal baskets. Then {d} {i} are added to one basket. How many {i} are in that basket?",
        "They pick {1} {i}.\nEach basket holds {2} {i}.\nThat basket has {3} {i}.",
    ),
];
