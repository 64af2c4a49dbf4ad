//! The Markdown form of a report.

use std::fmt::Write as _;

use super::table::Section;

pub fn render(title: &str, sections: &[Section]) -> String {
    let mut out = format!("# {}\n", escape(title));
    if sections.is_empty() {
        out += "\nNo rows.\n";
    }
    for section in sections {
        let _ = write!(out, "\n## {}\n", escape(&section.title()));
        for table in &section.tables {
            let columns = table.columns();
            let _ = write!(out, "\n### {}\n\n{}\n\n|", escape(&table.title()), table.direction());
            for column in &columns {
                let _ = write!(out, " {} |", escape(&column.heading));
            }
            out += "\n|";
            for column in &columns {
                out += if column.numeric { "---:|" } else { "---|" };
            }
            out.push('\n');
            for row in &table.rows {
                out.push('|');
                for column in &columns {
                    let cell = escape(&column.cell(row));
                    let bold = column.heading == "value" && table.is_best(row);
                    let _ = if bold { write!(out, " **{cell}** |") } else { write!(out, " {cell} |") };
                }
                out.push('\n');
            }
        }
    }
    out
}

/// Keeps names from ending a cell or opening a tag.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('|', "\\|").replace(['\n', '\r'], " ")
}
