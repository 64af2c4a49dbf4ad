//! The HTML form of a report: one file that needs nothing else.

use std::fmt::Write as _;

use super::plot;
use super::table::{Section, Table};
use crate::error::Result;

const STYLE: &str = "\
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 60rem; margin: 2rem auto; \
padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { border-bottom: 1px solid #ccc; padding-bottom: .2rem; margin-top: 3rem; }
nav a { margin-right: 1rem; } a { color: #0b5fa5; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; } .num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
.note { color: #555; margin: .2rem 0 .6rem; font-size: .9rem; }
";

pub fn render(title: &str, sections: &[Section]) -> Result<String> {
    let mut out = String::from("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    out += "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n";
    let _ = write!(
        out,
        "<title>{0}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{0}</h1>\n",
        escape(title)
    );
    if sections.is_empty() {
        out += "<p>No rows.</p>\n";
    }
    if sections.len() > 1 {
        out += "<nav>";
        for (i, section) in sections.iter().enumerate() {
            let _ = write!(out, "<a href=\"#s{i}\">{}</a>", escape(&section.title()));
        }
        out += "</nav>\n";
    }
    for (i, section) in sections.iter().enumerate() {
        let _ = writeln!(out, "<h2 id=\"s{i}\">{}</h2>", escape(&section.title()));
        for table in &section.tables {
            render_table(&mut out, table)?;
        }
    }
    out += "</body>\n</html>\n";
    Ok(out)
}

fn render_table(out: &mut String, table: &Table) -> Result<()> {
    let _ = writeln!(out, "<h3>{}</h3>\n<p class=\"note\">{}</p>", escape(&table.title()), table.direction());
    if let Some(svg) = plot::draw(table)? {
        let paper = table.rows.iter().any(|r| r.paper.is_some() && r.x.is_none());
        let paper = if paper { "; ◇ the paper's value" } else { "" };
        let caption = format!("● value, bar: 95 % interval{paper}");
        let _ = writeln!(out, "<figure>{svg}<figcaption class=\"note\">{caption}</figcaption></figure>");
    }
    let columns = table.columns();
    let class = |numeric| if numeric { " class=\"num\"" } else { "" };
    out.push_str("<div class=\"scroll\"><table>\n<thead><tr>");
    for column in &columns {
        let _ = write!(out, "<th{}>{}</th>", class(column.numeric), escape(&column.heading));
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    for row in &table.rows {
        out.push_str("<tr>");
        for column in &columns {
            let cell = escape(&column.cell(row));
            let bold = column.heading == "value" && table.is_best(row);
            let cell = if bold { format!("<strong>{cell}</strong>") } else { cell };
            let _ = write!(out, "<td{}>{cell}</td>", class(column.numeric));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody>\n</table></div>\n");
    Ok(())
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
