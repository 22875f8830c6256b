//! One row a figure: printed as it comes, kept as JSON.

use std::path::Path;

#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
}

#[derive(serde::Serialize)]
struct Row {
    name: String,
    value: f64,
    unit: &'static str,
    limit: Option<&'static str>,
    limit_value: Option<f64>,
}

impl Report {
    /// A figure with its unit, and the limit beside it.
    pub(crate) fn row(
        &mut self,
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
        limit: Option<(&'static str, f64)>,
    ) {
        let name = name.into();
        let beside = limit.map_or(String::new(), |(what, limit)| {
            format!("{:>14} {what} ({:.0} %)", human(limit), 100.0 * value / limit)
        });
        println!("{name:<52} {:>12} {unit:<10} {beside}", human(value));
        let (limit, limit_value) = limit.unzip();
        self.rows.push(Row { name, value, unit, limit, limit_value });
    }

    /// Keeps the rows as `target/bench/{name}.json`.
    pub(crate) fn write_json(&self, name: &str) {
        let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or(default, Into::into);
        let dir = target.join("bench");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(format!("{name}.json")), serde_json::to_vec_pretty(&self.rows).unwrap()).unwrap();
    }
}

fn human(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.2} M", v / 1e6),
        v if v >= 1e4 => format!("{:.1} k", v / 1e3),
        v if v >= 100.0 => format!("{v:.0}"),
        v => format!("{v:.2}"),
    }
}
