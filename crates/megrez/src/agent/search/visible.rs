//! The text of an HTML page that a reader sees.

use scraper::node::{Element, Node};
use scraper::{Html, Selector};

/// Elements whose content is not shown, or is no text of the page's.
const HIDDEN: [&str; 16] = [
    "script", "style", "noscript", "template", "head", "svg", "math", "iframe", "object", "canvas", "audio",
    "video", "select", "textarea", "button", "dialog",
];

/// Elements that stand on lines of their own.
const BLOCKS: [&str; 38] = [
    "address",
    "article",
    "aside",
    "blockquote",
    "body",
    "br",
    "caption",
    "dd",
    "details",
    "div",
    "dl",
    "dt",
    "fieldset",
    "figcaption",
    "figure",
    "footer",
    "form",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "header",
    "hr",
    "li",
    "main",
    "nav",
    "ol",
    "p",
    "pre",
    "section",
    "summary",
    "table",
    "tr",
    "td",
    "th",
    "ul",
];

/// Elements that are never closed, or need not be.
const UNCLOSED: [&str; 24] = [
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr",
    "p", "li", "dt", "dd", "tr", "td", "th", "option", "tbody", "thead", "colgroup",
];

/// Deepest nesting that is read. The time to parse grows with the square of the depth, and no page for people comes near.
const MAX_DEPTH: usize = 3000;

/// Title and visible text of a page: one line for each block, white space collapsed. `None` for markup that is nested so
/// deep that only an attack explains it.
pub fn visible_text(html: &str) -> Option<(String, String)> {
    if depth(html) > MAX_DEPTH {
        return None;
    }
    let document = Html::parse_document(html);
    let title = Selector::parse("head > title")
        .ok()
        .and_then(|s| document.select(&s).next().map(|t| collapse(&t.text().collect::<String>())))
        .unwrap_or_default();
    let mut lines = Lines::default();
    // An explicit walk: recursion would follow the page's depth.
    let block = |node: &Node| matches!(node, Node::Element(e) if BLOCKS.contains(&e.name()));
    let mut node = document.tree.root();
    'walk: loop {
        let shown = !matches!(node.value(), Node::Element(e) if is_hidden(e));
        if let Node::Text(text) = node.value() {
            lines.push(text);
        } else if block(node.value()) {
            lines.end();
        }
        if let Some(child) = node.first_child().filter(|_| shown) {
            node = child;
            continue;
        }
        loop {
            if block(node.value()) {
                lines.end();
            }
            if let Some(next) = node.next_sibling() {
                node = next;
                break;
            }
            let Some(parent) = node.parent() else { break 'walk };
            node = parent;
        }
    }
    Some((title, lines.finish()))
}

fn is_hidden(e: &Element) -> bool {
    let style = |s: &str| {
        let s: String = s.chars().filter(|c| !c.is_whitespace()).collect::<String>().to_ascii_lowercase();
        s.contains("display:none") || s.contains("visibility:hidden")
    };
    HIDDEN.contains(&e.name())
        || e.attr("hidden").is_some()
        || e.attr("aria-hidden") == Some("true")
        || e.attr("style").is_some_and(style)
}

/// An upper estimate of how deep elements are nested, from the tags alone.
fn depth(html: &str) -> usize {
    let (mut depth, mut deepest) = (0usize, 0);
    for tag in html.split('<').skip(1) {
        let close = tag.starts_with('/');
        let name: String = tag
            .trim_start_matches('/')
            .chars()
            .take_while(char::is_ascii_alphanumeric)
            .take(16)
            .collect::<String>()
            .to_ascii_lowercase();
        if name.is_empty() || UNCLOSED.contains(&name.as_str()) {
            continue;
        }
        depth = if close { depth.saturating_sub(1) } else { depth + 1 };
        deepest = deepest.max(depth);
    }
    deepest
}

/// Lines of text with white space collapsed; empty ones are left out.
#[derive(Default)]
struct Lines {
    done: String,
    line: String,
}

impl Lines {
    fn push(&mut self, text: &str) {
        self.line.push_str(text);
    }

    fn end(&mut self) {
        let line = collapse(&self.line);
        self.line.clear();
        if !line.is_empty() {
            if !self.done.is_empty() {
                self.done.push('\n');
            }
            self.done.push_str(&line);
        }
    }

    fn finish(mut self) -> String {
        self.end();
        self.done
    }
}

fn collapse(text: &str) -> String {
    let mut out = String::new();
    for word in text.split_whitespace() {
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(word);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_styles_and_hidden_elements_are_left_out() {
        let page = r#"<!doctype html><html><head><title> The
            weather </title><style>p { color: red }</style></head><body>
            <nav>Home</nav><p>It is <b>sun</b>ny.<br>Very.</p><script>let x = "no";</script>
            <div hidden>no</div><div style="Display : None"><p>no</p></div><span aria-hidden="true">no</span>
            <ul><li>one<li>two</ul><noscript>no</noscript>明天有雨 &amp; 风</body></html>"#;
        let (title, text) = visible_text(page).unwrap();
        assert_eq!(title, "The weather");
        assert_eq!(text, "Home\nIt is sunny.\nVery.\none\ntwo\n明天有雨 & 风");
    }

    #[test]
    fn markup_that_only_an_attack_explains_is_refused() {
        assert!(visible_text(&"<div>".repeat(100_000)).is_none());
        assert!(visible_text(&"<p>a<li>".repeat(5_000)).is_some());
        let nested = format!("{}deep{}", "<div>".repeat(500), "</div>".repeat(500));
        assert_eq!(visible_text(&nested).unwrap().1, "deep");
        assert_eq!(visible_text("").unwrap().1, "");
    }
}
