//! SVG plots of one table: points with their intervals, or lines over `x`.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::table::{Table, number};
use crate::error::{Error, Result};
use crate::row::Row;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Okabe and Ito's palette: told apart with any colour vision.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(90, 90, 90),
];
const WIDTH: u32 = 820;
const TEXT: u32 = 14;
/// Values beyond this cannot be scaled to pixels in double precision without overflow; they stay in the table.
const LARGEST: f64 = 1e150;

/// The plot of a table; `None` when it has nothing worth drawing.
pub fn draw(table: &Table) -> Result<Option<String>> {
    let rows: Vec<&Row> = table.rows.iter().copied().filter(|r| drawable(r.value)).collect();
    // A single number with nothing to hold it against is no picture.
    if rows.is_empty() || matches!(&rows[..], [row] if row.ci.is_none() && row.paper.is_none()) {
        return Ok(None);
    }
    let lines = rows.iter().all(|r| r.x.is_some_and(drawable));
    let height = if lines { 400 } else { 70 + 34 * rows.len() as u32 };
    let mut svg = String::new();
    let outcome = {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        if lines { draw_lines(&area, table, &rows) } else { draw_points(&area, table, &rows) }
    };
    outcome.map_err(|e| Error::Plot { what: table.title(), reason: e.to_string() })?;
    Ok(Some(svg))
}

fn drawable(v: f64) -> bool {
    v.is_finite() && v.abs() < LARGEST
}

fn text_style(anchor: Pos) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", TEXT).into_font()).pos(anchor)
}

/// One line of the plot for each row: name, interval, value, and the paper's value as a hollow diamond.
fn draw_points(area: &Area, table: &Table, rows: &[&Row]) -> Drawn<()> {
    area.fill(&WHITE)?;
    let labels: Vec<String> = rows.iter().map(|r| shorten(&table.label(r))).collect();
    let longest = labels.iter().map(|l| width(l)).max().unwrap_or(0);
    let mut values: Vec<f64> = rows.iter().map(|r| r.value).collect();
    values.extend(rows.iter().filter_map(|r| r.ci).flatten().filter(|v| drawable(*v)));
    values.extend(rows.iter().filter_map(|r| r.paper).filter(|v| drawable(*v)));
    let xs = padded(&values);
    let count = rows.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .margin_right(70)
        .x_label_area_size(50)
        .y_label_area_size(longest + 16)
        .build_cartesian_2d(xs.clone(), -0.5..count - 0.5)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .x_labels(8)
        .light_line_style(TRANSPARENT)
        .x_label_formatter(&|x| number(round_tick(*x, &xs)))
        .x_desc(table.axis())
        .label_style(text_style(Pos::new(HPos::Center, VPos::Top)))
        .draw()?;
    for (i, (row, label)) in rows.iter().zip(&labels).enumerate() {
        let y = count - 1.0 - i as f64;
        let colour = COLOURS[i % COLOURS.len()];
        let (left, row_y) = chart.backend_coord(&(xs.start, y));
        area.draw(&Text::new(
            label.clone(),
            (left - 8, row_y),
            text_style(Pos::new(HPos::Right, VPos::Center)),
        ))?;
        if let Some([low, high]) = row.ci.filter(|ci| ci.iter().all(|v| drawable(*v))) {
            let line = colour.stroke_width(2);
            chart.draw_series([
                PathElement::new(vec![(low, y), (high, y)], line),
                PathElement::new(vec![(low, y - 0.15), (low, y + 0.15)], line),
                PathElement::new(vec![(high, y - 0.15), (high, y + 0.15)], line),
            ])?;
        }
        chart.draw_series([Circle::new((row.value, y), 5, colour.filled())])?;
        if let Some(paper) = row.paper.filter(|v| drawable(*v)) {
            let (px, py) = chart.backend_coord(&(paper, y));
            let diamond = vec![(px, py - 7), (px + 7, py), (px, py + 7), (px - 7, py), (px, py - 7)];
            area.draw(&PathElement::new(diamond, BLACK.stroke_width(1)))?;
        }
        // The number stands to the right of everything drawn for the row.
        let right = row.ci.map_or(row.value, |ci| ci[1].max(row.value)).max(row.paper.unwrap_or(row.value));
        let (text_x, _) = chart.backend_coord(&(right.min(xs.end), y));
        let style = text_style(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new(number(row.value), (text_x + 12, row_y), style))?;
    }
    area.present()?;
    Ok(())
}

/// One line for each variant, with vertical intervals, and a legend.
fn draw_lines(area: &Area, table: &Table, rows: &[&Row]) -> Drawn<()> {
    area.fill(&WHITE)?;
    let mut lines: Vec<(String, Vec<&Row>)> = Vec::new();
    for row in rows {
        let label = shorten(&table.label(row));
        match lines.iter_mut().find(|(name, _)| *name == label) {
            Some((_, line)) => line.push(row),
            None => lines.push((label, vec![row])),
        }
    }
    let xs: Vec<f64> = rows.iter().filter_map(|r| r.x).collect();
    let mut ys: Vec<f64> = rows.iter().map(|r| r.value).collect();
    ys.extend(rows.iter().filter_map(|r| r.ci).flatten().filter(|v| drawable(*v)));
    let (x_range, y_range) = (padded(&xs), padded(&ys));
    let legend = lines.iter().map(|(name, _)| width(name)).max().unwrap_or(0) + 60;
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .margin_right(legend)
        .x_label_area_size(50)
        .y_label_area_size(80)
        .build_cartesian_2d(x_range.clone(), y_range.clone())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_labels(8)
        .x_label_formatter(&|x| number(round_tick(*x, &x_range)))
        .y_label_formatter(&|y| number(round_tick(*y, &y_range)))
        .x_desc(table.x_label())
        .y_desc(table.axis())
        .label_style(("sans-serif", TEXT))
        .draw()?;
    for (i, (name, mut line)) in lines.into_iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        line.sort_by(|a, b| a.x.unwrap_or(0.0).total_cmp(&b.x.unwrap_or(0.0)));
        let points: Vec<(f64, f64)> = line.iter().map(|r| (r.x.unwrap_or(0.0), r.value)).collect();
        chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
        chart.draw_series(points.iter().map(|&p| Circle::new(p, 4, colour.filled())))?;
        for row in line {
            if let (Some(x), Some([low, high])) = (row.x, row.ci.filter(|ci| ci.iter().all(|v| drawable(*v))))
            {
                chart.draw_series([PathElement::new(vec![(x, low), (x, high)], colour.stroke_width(1))])?;
            }
        }
        let (left, top) = (WIDTH as i32 - legend as i32 + 16, 24 + 22 * i as i32);
        area.draw(&PathElement::new(vec![(left, top), (left + 22, top)], colour.stroke_width(3)))?;
        let style = text_style(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new(name, (left + 30, top), style))?;
    }
    area.present()?;
    Ok(())
}

/// The span of the values with a margin; never empty.
fn padded(values: &[f64]) -> Range<f64> {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let span = high - low;
    // Equal values, or so close that ticks would coincide.
    let margin =
        if span > low.abs().max(high.abs()) * 1e-9 { span * 0.06 } else { low.abs().max(1e-9) * 0.5 };
    low - margin..high + margin
}

/// Takes the rounding noise of computed ticks away (`0.30000000000000004`, `-5.5e-17`).
fn round_tick(tick: f64, range: &Range<f64>) -> f64 {
    let unit = (range.end - range.start) * 1e-6;
    if tick.abs() < unit { 0.0 } else { tick }
}

/// About how many pixels a text takes: the SVG is laid out without a font at hand.
fn width(text: &str) -> u32 {
    text.chars().map(|c| if c.is_ascii() { 8 } else { 15 }).sum()
}

/// Names beyond what a plot has room for are cut; the table has them whole.
fn shorten(name: &str) -> String {
    const MOST: usize = 36;
    if name.chars().count() <= MOST {
        return name.to_owned();
    }
    name.chars().take(MOST - 1).chain(['…']).collect()
}
