//! What happens to tasks, as it is shown: JSON for programs, lines for files and pipes, and on a terminal a bar for each task that
//! tells how far it is, below the lines.

use std::{collections::HashMap, io::IsTerminal as _};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use trunkline_client::{
    proto::task_event::Event,
    task::{TaskEvent, TaskStatus},
};

use super::word;
use crate::cli::{output::plain, say};

/// Cells of a progress bar in a line.
const CELLS: usize = 20;

/// Steps of a bar on a terminal.
const STEPS: u64 = 1000;

pub(super) enum Shown {
    Json,
    Lines,
    Bars { all: MultiProgress, bars: HashMap<String, ProgressBar> },
}

impl Shown {
    pub(super) fn new(json: bool) -> Self {
        if json {
            return Self::Json;
        }
        if !std::io::stdout().is_terminal() {
            return Self::Lines;
        }
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stdout());
        // One that can do nothing but lines.
        if all.is_hidden() { Self::Lines } else { Self::Bars { all, bars: HashMap::new() } }
    }

    pub(super) fn tell(&mut self, event: &TaskEvent) {
        let Some((text, value)) = words(event) else { return };
        match self {
            Self::Json => {
                say(json!({"task_id": event.task_id, "at_ms": event.emitted_at_unix_ms, "event": value}));
            }
            Self::Lines => say(plain(&format!("{} {}", event.task_id, text.trim_end()))),
            Self::Bars { all, bars } => draw(all, bars, event, &text),
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Self::Bars { bars, .. } = self {
            bars.values().for_each(ProgressBar::abandon);
        }
    }
}

fn draw(all: &MultiProgress, bars: &mut HashMap<String, ProgressBar>, event: &TaskEvent, text: &str) {
    let id = &event.task_id;
    if let Some(Event::Progress(progress)) = &event.event {
        let bar = bars.entry(id.clone()).or_insert_with(|| {
            let bar = all.add(ProgressBar::new(STEPS));
            // A template of ours has no mistakes; without it the bar looks plain.
            if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:30}] {percent:>3} % {elapsed} {wide_msg}") {
                bar.set_style(style.progress_chars("#>-"));
            }
            bar.with_prefix(id.clone())
        });
        // Less than nothing is done if nobody knows how much.
        bar.set_position((progress.progress.clamp(0.0, 1.0) * STEPS as f64) as u64);
        bar.set_message(plain(&format!("{} {}", progress.state, progress.message)));
        return;
    }
    if let Some(Event::StatusChanged(change)) = &event.event
        && is_end(change.to_status)
        && let Some(bar) = bars.remove(id)
    {
        bar.finish_and_clear();
    }
    // A terminal that is gone shows nothing more.
    let _ = all.println(plain(&format!("{id} {}", text.trim_end())));
}

fn is_end(status: i32) -> bool {
    use TaskStatus::{Cancelled, Completed, Failed, Rejected};
    matches!(TaskStatus::try_from(status), Ok(Completed | Failed | Cancelled | Rejected))
}

/// What happened, for people and for programs.
fn words(event: &TaskEvent) -> Option<(String, serde_json::Value)> {
    Some(match event.event.as_ref()? {
        Event::StatusChanged(change) => {
            let (from, to, reason) = (word(change.from_status), word(change.to_status), &change.reason);
            (format!("{to} {reason}"), json!({"from": from, "to": to, "reason": reason}))
        }
        Event::Progress(progress) => {
            let done = (progress.progress.clamp(0.0, 1.0) * CELLS as f64) as usize;
            let bar = "#".repeat(done) + &"-".repeat(CELLS - done);
            let (state, percent, message) = (&progress.state, progress.progress * 100.0, &progress.message);
            let text = format!("[{bar}] {percent:.0} % {state} {message}");
            (text, json!({"state": state, "progress": progress.progress, "message": message}))
        }
        Event::ChildLifecycle(child) => {
            let (child_id, lifecycle, status) = (&child.child_task_id, &child.lifecycle, word(child.child_status));
            let text = format!("child {child_id} {lifecycle}: {status}");
            (text, json!({"child": child_id, "lifecycle": lifecycle, "status": status}))
        }
        _ => return None,
    })
}
