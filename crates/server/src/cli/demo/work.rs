//! What the demo's sandbox runs: it reads prompts, a line each, and tells what it does as events.

use std::{
    io::{BufRead as _, Write as _},
    time::Duration,
};

use serde_json::{Value, json};

use crate::cli::Done;

/// How fast it works.
const PAUSE: Duration = Duration::from_millis(60);

pub(crate) fn run(is_fast: bool) -> Done {
    let tell = |event: Value| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{event}").and_then(|()| out.flush())?;
        if !is_fast {
            std::thread::sleep(PAUSE);
        }
        Ok::<_, std::io::Error>(())
    };
    for line in std::io::stdin().lock().lines() {
        for event in events(&line?) {
            tell(event)?;
        }
    }
    Ok(())
}

fn events(prompt: &str) -> Vec<Value> {
    let mut events = Vec::new();
    for word in format!("Let me see what “{prompt}” needs: a plan, a look around, and a file.").split_inclusive(' ')
    {
        events.push(json!({"type": "text_delta", "delta": word}));
    }
    let plan = ["read what was asked", "count its words", "write them down"];
    events.push(json!({"type": "plan", "steps": plan}));
    events.push(json!({"type": "tool_start", "name": "wc", "input": format!("echo {prompt:?} | wc -w")}));
    let count = prompt.split_whitespace().count();
    events.push(json!({"type": "tool_output_delta", "delta": format!("{count}\n")}));
    events.push(json!({"type": "tool_end", "result": count}));
    let lines: String = prompt.split_whitespace().map(|word| format!("+{word}\n")).collect();
    events.push(json!({"type": "file_change", "path": "words.txt", "diff": lines}));
    for word in format!("Done: {count} words are in words.txt.").split_inclusive(' ') {
        events.push(json!({"type": "text_delta", "delta": word}));
    }
    events
}
