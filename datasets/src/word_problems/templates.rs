//! How a computation is put into words.
//!
//! Placeholders of a wording: `{a}` to `{d}` the given numbers, `{1}` to `{3}` the equations of the steps, `{x}` to
//! `{z}` their results, `{n}` and `{m}` two people, `{i}` an item, `{q}` its Chinese measure word.

use super::{Draws, Lang, Plan, Worked};

mod en;
mod zh;

/// A wording of a plan in one language.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Template {
    /// The language.
    pub lang: Lang,
    /// The computation asked for.
    pub plan: Plan,
    /// Tells wordings of one plan and language apart.
    pub wording: usize,
    question: &'static str,
    /// Worked steps without the final answer line.
    steps: &'static str,
}

impl Template {
    /// `<lang>/<plan>/<wording>`
    pub fn name(&self) -> String {
        format!("{}/{}/{}", self.lang.name(), self.plan.name(), self.wording)
    }

    /// Question and solution for `numbers`, with people and item drawn.
    pub(super) fn dress(&self, numbers: &[i64], worked: &Worked, draws: &mut Draws) -> (String, String) {
        let (people, items) = match self.lang {
            Lang::En => (en::PEOPLE, en::ITEMS),
            Lang::Zh => (zh::PEOPLE, zh::ITEMS),
        };
        let first = draws.between(0, people.len() as i64 - 1) as usize;
        // Any person but the first.
        let other = draws.between(1, people.len() as i64 - 1) as usize;
        let second = (first + other) % people.len();
        let (measure, item) = *draws.pick(items);
        let fill = |text: &str| -> String {
            let mut out = String::with_capacity(text.len() + 32);
            let mut rest = text;
            while let Some(at) = rest.find('{') {
                out.push_str(&rest[..at]);
                match rest.as_bytes()[at + 1] {
                    b'n' => out.push_str(people[first]),
                    b'm' => out.push_str(people[second]),
                    b'i' => out.push_str(item),
                    b'q' => out.push_str(measure),
                    k @ b'a'..=b'd' => out.push_str(&numbers[usize::from(k - b'a')].to_string()),
                    k @ b'1'..=b'3' => out.push_str(&worked.equations[usize::from(k - b'1')]),
                    k @ b'x'..=b'z' => out.push_str(&worked.results[usize::from(k - b'x')].to_string()),
                    k => unreachable!("placeholder {:?} in the template `{}`", char::from(k), self.name()),
                }
                rest = &rest[at + 3..];
            }
            out.push_str(rest);
            out
        };
        (fill(self.question), format!("{}\n#### {}", fill(self.steps), worked.answer()))
    }
}

/// Every template: each plan in two wordings in each language.
pub fn templates() -> &'static [Template] {
    const ALL: [Template; 60] = {
        let mut all = [numbered(Lang::En, en::WORDINGS[0], 0); 60];
        let mut i = 0;
        while i < 60 {
            let (lang, wordings) = if i < 30 { (Lang::En, &en::WORDINGS) } else { (Lang::Zh, &zh::WORDINGS) };
            all[i] = numbered(lang, wordings[i % 30], i % 2);
            i += 1;
        }
        all
    };
    &ALL
}

/// Plan, question, worked steps. Wordings of one plan stand together, two by two.
type Wording = (Plan, &'static str, &'static str);

const fn numbered(lang: Lang, (plan, question, steps): Wording, wording: usize) -> Template {
    Template { lang, plan, wording, question, steps }
}
