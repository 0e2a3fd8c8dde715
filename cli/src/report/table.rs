//! Plain tables: columns, no lines.

use comfy_table::{Cell, CellAlignment, Table, presets};

use crate::say::{shortened, visible};

/// Most characters of a cell: each row is as wide as the widest one, and a name may have millions.
const CELL: usize = 400;

fn shown(text: &str) -> String {
    shortened(&visible(text), CELL).into_owned()
}

/// How a column stands.
#[derive(Clone, Copy)]
pub(crate) enum Align {
    Left,
    Right,
}

/// Renders rows below a header; empty if there are no rows.
pub(crate) fn render(header: &[(&str, Align)], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let cell = |text: &str, align: Align| {
        Cell::new(shown(text)).set_alignment(match align {
            Align::Left => CellAlignment::Left,
            Align::Right => CellAlignment::Right,
        })
    };
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header.iter().map(|(text, align)| cell(text, *align)));
    for row in rows {
        table.add_row(
            row.iter()
                .zip(header)
                .map(|(text, (_, align))| cell(text, *align)),
        );
    }
    if table.row_count() == 0 {
        return String::new();
    }
    finish(&table)
}

/// Renders names beside their values.
pub(crate) fn facts(rows: impl IntoIterator<Item = (String, String)>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    for (name, value) in rows {
        table.add_row([shown(&name), shown(&value)]);
    }
    finish(&table)
}

fn finish(table: &Table) -> String {
    let mut text = String::new();
    for line in table.to_string().lines() {
        text.push_str(line.strip_prefix(' ').unwrap_or(line).trim_end());
        text.push('\n');
    }
    text
}
