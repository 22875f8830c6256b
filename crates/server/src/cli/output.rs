//! What commands print: tables for people, JSON for programs, again and again if asked.

use std::{io::IsTerminal as _, time::Duration};

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::{Map, Value};

use super::{Done, Fault, say};

/// How a command's answer is printed.
#[derive(Clone, Default, clap::Args)]
pub(crate) struct Output {
    /// Prints JSON, a line for each thing.
    #[arg(long)]
    json: bool,
    /// Prints again every so many seconds, until it is interrupted.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    watch: Option<u64>,
}

/// One thing: its fields in their order.
pub(crate) type Row = Vec<(&'static str, Value)>;

impl Output {
    /// Whether programs read it.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Prints what a request answers, once or again and again.
    pub(crate) async fn show<F>(&self, ask: impl FnMut() -> F) -> Done
    where
        F: Future<Output = Result<Vec<Row>, Fault>>,
    {
        self.show_with(ask, || {}).await
    }

    /// As [`Output::show`], with a line behind each table.
    pub(crate) async fn show_with<F>(&self, mut ask: impl FnMut() -> F, behind: impl Fn()) -> Done
    where
        F: Future<Output = Result<Vec<Row>, Fault>>,
    {
        loop {
            let rows = ask().await?;
            if self.watch.is_some() && !self.json {
                clear();
            }
            self.print(&rows);
            if !self.json {
                behind();
            }
            match self.watch {
                Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds)).await,
                None => return Ok(()),
            }
        }
    }

    /// Prints some things.
    pub(crate) fn print(&self, rows: &[Row]) {
        if self.json {
            for row in rows {
                let fields: Map<String, Value> =
                    row.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
                say(Value::Object(fields));
            }
        } else if let Some(first) = rows.first() {
            let mut table = Table::new();
            table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
            table.set_header(first.iter().map(|(name, _)| name.to_uppercase().replace('_', " ")));
            for row in rows {
                table.add_row(row.iter().map(|(_, value)| cell(value)));
            }
            for line in table.lines() {
                say(line.trim());
            }
        }
    }

    /// Prints what was done: a line for people, the fields for programs.
    pub(crate) fn done(&self, line: impl std::fmt::Display, row: Row) {
        if self.json { self.print(&[row]) } else { say(line) }
    }
}

/// All pages of a list, each of which answers how many there are in all, or as many as are wanted.
pub(crate) async fn pages<T>(
    most: usize,
    mut page: impl AsyncFnMut(i32) -> trunkline_client::Result<(Vec<T>, u64)>,
) -> Result<Vec<T>, Fault> {
    let mut all = Vec::new();
    loop {
        let (more, total) = page(i32::try_from(all.len()).unwrap_or(i32::MAX)).await?;
        let is_last = more.is_empty();
        all.extend(more);
        if is_last || all.len() >= most || all.len() as u64 >= total {
            all.truncate(most);
            return Ok(all);
        }
    }
}

/// Begins again at the top, if there is one.
pub(crate) fn clear() {
    if std::io::stdout().is_terminal() {
        // To the top left, and nothing below.
        super::put("\x1b[H\x1b[2J");
    }
}

/// On one line, and without what could move a terminal's cursor.
fn cell(value: &Value) -> String {
    let text = match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Array(all) => all.iter().map(cell).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    };
    plain(&text)
}

/// Without what could move a terminal's cursor.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// A time for people and programs alike, or nothing.
pub(crate) fn time(unix_seconds: i64) -> Value {
    let Some(seconds) = u64::try_from(unix_seconds).ok().filter(|seconds| *seconds > 0) else { return Value::Null };
    let time = std::time::UNIX_EPOCH + Duration::from_secs(seconds);
    Value::String(humantime::format_rfc3339_seconds(time).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_is_one_line_and_moves_nothing() {
        let cases = [
            (Value::Null, "-"),
            (Value::String(String::new()), "-"),
            (Value::String("a\n\x1b[2Jb".into()), "a\u{fffd}\u{fffd}[2Jb"),
            (serde_json::json!(["a", 1, true]), "a,1,yes"),
        ];
        for (value, expected) in cases {
            assert_eq!(cell(&value), expected);
        }
        assert_eq!((time(0), time(1)), (Value::Null, Value::String("1970-01-01T00:00:01Z".into())));
    }
}
