//! `top`: a server as it stands, live. On a terminal a screen, elsewhere lines.

mod screen;
mod view;

use std::{io::IsTerminal as _, time::Duration};

use crossterm::event::{Event, EventStream, KeyCode, KeyEventKind, KeyModifiers};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::sleep,
};
use trunkline_client::{Kind, Operator, operator};

use self::view::{Order, Row, View};
use super::{
    Done, Fault, block_on,
    client::Connect,
    output::{Output, Row as Fields},
    say,
};

/// The wait before a server that went away is asked again.
const AGAIN: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub(crate) struct Top {
    /// Milliseconds between two looks.
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(200..=60_000))]
    interval: u64,
    /// Sessions that are shown: those with the greatest lag, and then those that do the most.
    #[arg(long, value_name = "COUNT", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    sessions: u32,
    /// What comes first: lag, in, out, name.
    #[arg(long, value_name = "COLUMN", default_value = "lag")]
    sort: Order,
    /// Ends after so many looks [default: one if this is no terminal, else none].
    #[arg(long, value_name = "COUNT")]
    count: Option<u64>,
    /// Prints JSON, a line for each look.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connect: Connect,
}

pub(crate) fn run(args: &Top) -> Done {
    block_on(async {
        let operator = args.connect.operator().await?;
        let figures = operator.watch(Duration::from_millis(args.interval), args.sessions).await.map_err(Fault::from)?;
        if args.json || !std::io::stdout().is_terminal() {
            return Ok(print(args, figures).await?);
        }
        let mut terminal = ratatui::try_init()?;
        let shown = show(args, &operator, figures, &mut terminal).await;
        ratatui::restore();
        Ok(shown?)
    })
}

type Figures = operator::Stream<operator::Figures>;

/// Without a terminal: a table, or JSON, again and again.
async fn print(args: &Top, mut figures: Figures) -> Result<(), Fault> {
    let mut view = View::new(args.sort);
    let mut left = args.count.unwrap_or(if args.json { u64::MAX } else { 1 });
    while left > 0 {
        view.take(figures.next().await?.ok_or(Fault::Gone)?);
        // Rates take two looks.
        if view.is_timed() {
            if args.json {
                say(as_json(&view));
            } else {
                table(&view);
            }
            left -= 1;
        }
    }
    Ok(())
}

fn table(view: &View) {
    view.header().iter().for_each(say);
    let rows: Vec<Fields> = view.rows().iter().map(fields).collect();
    Output::default().print(&rows);
}

fn fields(row: &Row) -> Fields {
    vec![
        ("identity", json!(row.identity)),
        ("workspace", json!(row.workspace)),
        ("held", json!(row.held())),
        ("epoch", json!(row.fencing_epoch)),
        ("back", json!(row.reconnections)),
        ("in_per_s", json!(row.accepted_per_s.round() as u64)),
        ("out_per_s", json!(row.delivered_per_s.round() as u64)),
        ("unacknowledged", json!(row.unacknowledged)),
        ("lag", json!(row.lag())),
    ]
}

fn as_json(view: &View) -> Value {
    let Some(now) = view.now() else { return Value::Null };
    let session = |row: &Row| {
        json!({
            "session": row.session_id,
            "identity": row.identity,
            "workspace": row.workspace,
            "held_seconds": row.held_seconds,
            "fencing_epoch": row.fencing_epoch,
            "reconnections": row.reconnections,
            "accepted": row.accepted,
            "delivered": row.delivered,
            "accepted_per_s": row.accepted_per_s,
            "delivered_per_s": row.delivered_per_s,
            "unacknowledged": row.unacknowledged,
            "lag": row.lag,
        })
    };
    let rates = view.rates();
    json!({
        "unix_ms": now.unix_ms,
        "version": now.version,
        "uptime_seconds": now.uptime_seconds,
        "connections": now.connections,
        "http_connections": now.http_connections,
        "accepted_per_s": rates.accepted,
        "delivered_per_s": rates.delivered,
        "refused_per_s": rates.refused,
        "records_per_s": rates.records,
        "records": now.records,
        "resident_bytes": now.resident_bytes,
        "log_buffered_bytes": now.log_buffered_bytes,
        "sessions_total": now.sessions_total,
        "sessions": view.rows().iter().map(session).collect::<Vec<_>>(),
    })
}

/// On a terminal: until somebody says `q`.
async fn show(
    args: &Top,
    operator: &Operator,
    figures: Figures,
    terminal: &mut ratatui::DefaultTerminal,
) -> Result<(), Fault> {
    let (mut view, mut keys, mut figures) = (View::new(args.sort), EventStream::new(), Some(figures));
    // Whoever ends it so finds the terminal as it was.
    let (mut terminate, mut hangup) = (signal(SignalKind::terminate())?, signal(SignalKind::hangup())?);
    let mut left = args.count.unwrap_or(u64::MAX);
    loop {
        terminal.draw(|frame| screen::draw(frame, &mut view))?;
        if left == 0 {
            return Ok(());
        }
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = hangup.recv() => return Ok(()),
            event = keys.next() => match event {
                Some(Ok(event)) if asks_to_end(&event) => return Ok(()),
                Some(Ok(event)) => press(&mut view, &event),
                Some(Err(error)) => return Err(error.into()),
                None => return Ok(()),
            },
            now = next(args, operator, &mut figures) => match now {
                Ok(now) => {
                    view.take(now);
                    left -= 1;
                }
                Err(error) if matches!(error.kind(), Kind::Unavailable | Kind::Timeout) => view.lose(&error),
                Err(error) => return Err(error.into()),
            },
        }
    }
}

/// The next look; asks anew if the server went away. Cancel-safe.
async fn next(
    args: &Top,
    operator: &Operator,
    figures: &mut Option<Figures>,
) -> trunkline_client::Result<operator::Figures> {
    loop {
        if let Some(stream) = figures {
            match stream.next().await {
                Ok(Some(now)) => return Ok(now),
                Ok(None) => *figures = None,
                Err(error) => {
                    *figures = None;
                    return Err(error);
                }
            }
        }
        sleep(AGAIN).await;
        *figures = Some(operator.watch(Duration::from_millis(args.interval), args.sessions).await?);
    }
}

fn asks_to_end(event: &Event) -> bool {
    let Event::Key(key) = event else { return false };
    let is_interrupt = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    is_interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)
}

fn press(view: &mut View, event: &Event) {
    let Event::Key(key) = event else { return };
    if key.kind == KeyEventKind::Release {
        return;
    }
    match key.code {
        KeyCode::Char('l') => view.sort(Order::Lag),
        KeyCode::Char('i') => view.sort(Order::In),
        KeyCode::Char('o') => view.sort(Order::Out),
        KeyCode::Char('n') => view.sort(Order::Name),
        KeyCode::Char('p' | ' ') => view.pause(),
        KeyCode::Down | KeyCode::Char('j') => view.scroll(1),
        KeyCode::Up | KeyCode::Char('k') => view.scroll(-1),
        KeyCode::PageDown => view.scroll(20),
        KeyCode::PageUp => view.scroll(-20),
        KeyCode::Home => view.scroll(isize::MIN),
        _ => {}
    }
}
