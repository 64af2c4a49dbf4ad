//! Two differences between Jinja2 and minijinja that are settled in the source.

/// The source as minijinja takes it: line ends unified, as Jinja2 does on reading, and `{% generation %}` blocks turned
/// into scopes (`{% with %}`), which keeps their white-space control and hides what is set inside, as Jinja2's block does.
pub(super) fn prepare(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    let mut raw = false;
    while let Some(at) = rest.find("{%").into_iter().chain(rest.find("{{")).chain(rest.find("{#")).min() {
        let (text, tag) = rest.split_at(at);
        out.push_str(text);
        let kind = &tag[..2];
        if raw && kind != "{%" {
            out.push_str(kind);
            rest = &tag[2..];
            continue;
        }
        let end = if kind == "{#" {
            tag.find("#}").map_or(tag.len(), |end| end + 2)
        } else {
            tag_end(tag, if kind == "{%" { "%}" } else { "}}" })
        };
        let (tag, after) = tag.split_at(end);
        let name = if kind == "{%" { tag_name(tag) } else { "" };
        match name {
            "endraw" => raw = false,
            _ if raw => {
                out.push_str("{%");
                rest = &rest[at + 2..];
                continue;
            }
            "raw" => raw = true,
            _ => {}
        }
        match name {
            "generation" => out.push_str(&tag.replacen("generation", "with", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endwith", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Where a tag ends, strings inside it passed over.
fn tag_end(tag: &str, close: &str) -> usize {
    let mut quote = None;
    let mut escaped = false;
    for (at, c) in tag.char_indices().skip(2) {
        match quote {
            Some(q) => match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                _ if c == q => quote = None,
                _ => {}
            },
            None if c == '\'' || c == '"' => quote = Some(c),
            None if tag[at..].starts_with(close) => return at + close.len(),
            None => {}
        }
    }
    tag.len()
}

/// The first word of a block tag.
fn tag_name(tag: &str) -> &str {
    let inner = tag[2..].trim_start_matches(['-', '+']).trim_start();
    let end = inner.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inner.len());
    &inner[..end]
}

#[cfg(test)]
mod tests {
    use super::prepare;

    #[test]
    fn generation_blocks_become_scopes() {
        assert_eq!(prepare("a{%- generation -%}b{% endgeneration +%}c"), "a{%- with -%}b{% endwith +%}c");
        assert_eq!(prepare("{%generation%}{{ x }}{%endgeneration%}"), "{%with%}{{ x }}{%endwith%}");
    }

    #[test]
    fn nothing_else_is_touched() {
        for same in [
            "{{ '{% generation %}' }}",
            "{# {% generation %} #}",
            "{% raw %}{% generation %}{{ {% endraw %}",
            "{% set generation = '%}' %}{{ generation }}",
            "{% if x == \"\\\"%}{% generation %}\" %}{% endif %}",
            "{% generations %}",
            "unclosed {% generation",
            "{",
        ] {
            let expected = if same == "unclosed {% generation" { "unclosed {% with" } else { same };
            assert_eq!(prepare(same), expected);
        }
    }

    #[test]
    fn line_ends_are_unified() {
        assert_eq!(prepare("a\r\nb\rc\n"), "a\nb\nc\n");
    }
}
