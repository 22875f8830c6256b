//! What is shown of a server: figures in, rows and rates out. Everything here is pure.

use std::{
    cmp::Reverse,
    collections::{HashMap, VecDeque},
    time::Duration,
};

use trunkline_client::{
    Error,
    operator::{Figures, Standing},
};

use crate::cli::output::plain;

/// Looks that the curve goes back.
const HISTORY: usize = 240;

/// As far as servers count what is to come.
const LAG_MAX: u64 = 10_000;

/// What comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Order {
    /// Who has the most to come.
    Lag,
    /// Who sends the most.
    In,
    /// Who is given the most.
    Out,
    /// By identity.
    Name,
}

/// What happens in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rates {
    pub(super) accepted: f64,
    pub(super) delivered: f64,
    pub(super) refused: f64,
    pub(super) records: f64,
}

/// A session, as it is shown.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Row {
    pub(super) session_id: String,
    pub(super) identity: String,
    pub(super) workspace: String,
    pub(super) held_seconds: u64,
    pub(super) fencing_epoch: u64,
    pub(super) reconnections: u32,
    pub(super) accepted: u64,
    pub(super) delivered: u64,
    pub(super) accepted_per_s: f64,
    pub(super) delivered_per_s: f64,
    pub(super) unacknowledged: u64,
    pub(super) lag: u64,
}

impl Row {
    /// For how long the session has had its identity.
    pub(super) fn held(&self) -> String {
        duration(self.held_seconds)
    }

    pub(super) fn lag(&self) -> String {
        if self.lag >= LAG_MAX { format!("{}+", count(LAG_MAX)) } else { count(self.lag) }
    }
}

pub(super) struct View {
    now: Option<Figures>,
    rates: Rates,
    rows: Vec<Row>,
    order: Order,
    /// Messages delivered in a second, of each look.
    history: VecDeque<u64>,
    is_timed: bool,
    is_paused: bool,
    /// The first row that is shown.
    top: usize,
    /// Why nothing comes.
    lost: Option<String>,
}

impl View {
    pub(super) fn new(order: Order) -> Self {
        Self {
            now: None,
            rates: Rates::default(),
            rows: Vec::new(),
            order,
            history: VecDeque::new(),
            is_timed: false,
            is_paused: false,
            top: 0,
            lost: None,
        }
    }

    /// Another look.
    pub(super) fn take(&mut self, now: Figures) {
        self.lost = None;
        if self.is_paused {
            return;
        }
        // After a restart everything counts from the start, and there is nothing to compare with.
        let before = self.now.take().filter(|before| {
            before.records <= now.records && before.accepted <= now.accepted && before.delivered <= now.delivered
        });
        let seconds = before.as_ref().map_or(0, |before| now.unix_ms.saturating_sub(before.unix_ms)) as f64 / 1000.0;
        self.is_timed = seconds > 0.0;
        let rate =
            |before: u64, now: u64| if seconds > 0.0 { now.saturating_sub(before) as f64 / seconds } else { 0.0 };
        self.rates = before.as_ref().map_or(Rates::default(), |before| Rates {
            accepted: rate(before.accepted, now.accepted),
            delivered: rate(before.delivered, now.delivered),
            refused: rate(before.refused, now.refused),
            records: rate(before.records, now.records),
        });
        let known: HashMap<&str, &Standing> =
            before.iter().flat_map(|before| &before.sessions).map(|one| (one.session_id.as_str(), one)).collect();
        let row = |one: &Standing| {
            let known = known.get(one.session_id.as_str());
            Row {
                session_id: one.session_id.clone(),
                identity: plain(&one.identity),
                workspace: plain(&one.workspace),
                held_seconds: now.unix_ms.saturating_sub(one.connected_at_ms) / 1000,
                fencing_epoch: one.fencing_epoch,
                reconnections: one.reconnections,
                accepted: one.accepted,
                delivered: one.delivered,
                accepted_per_s: known.map_or(0.0, |known| rate(known.accepted, one.accepted)),
                delivered_per_s: known.map_or(0.0, |known| rate(known.delivered, one.delivered)),
                unacknowledged: one.unacknowledged,
                lag: one.lag,
            }
        };
        self.rows = now.sessions.iter().map(row).collect();
        self.now = Some(now);
        self.sort(self.order);
        if self.is_timed {
            if self.history.len() == HISTORY {
                self.history.pop_front();
            }
            self.history.push_back(self.rates.delivered as u64);
        }
    }

    /// Nothing comes any more; what was there stays.
    pub(super) fn lose(&mut self, why: &Error) {
        self.lost = Some(format!("{why}; asking again"));
    }

    pub(super) fn sort(&mut self, order: Order) {
        self.order = order;
        self.rows.sort_by(|a, b| {
            let key = |row: &Row| match order {
                Order::Lag => row.lag,
                // Whole messages, so that rows do not jump about.
                Order::In => row.accepted_per_s as u64,
                Order::Out => row.delivered_per_s as u64,
                Order::Name => 0,
            };
            (Reverse(key(a)), &a.identity).cmp(&(Reverse(key(b)), &b.identity))
        });
    }

    pub(super) fn pause(&mut self) {
        self.is_paused = !self.is_paused;
    }

    pub(super) fn scroll(&mut self, by: isize) {
        self.top = self.top.saturating_add_signed(by).min(self.rows.len().saturating_sub(1));
    }

    /// Whether there was a look before this one, so that there are rates.
    pub(super) fn is_timed(&self) -> bool {
        self.is_timed
    }

    pub(super) fn now(&self) -> Option<&Figures> {
        self.now.as_ref()
    }

    pub(super) fn rates(&self) -> Rates {
        self.rates
    }

    pub(super) fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Those that are on the screen.
    pub(super) fn shown(&mut self) -> &[Row] {
        self.top = self.top.min(self.rows.len().saturating_sub(1));
        &self.rows[self.top..]
    }

    pub(super) fn history(&self) -> &VecDeque<u64> {
        &self.history
    }

    pub(super) fn order(&self) -> Order {
        self.order
    }

    /// What is wrong, or is held.
    pub(super) fn notice(&self) -> Option<&str> {
        self.lost.as_deref().or(self.is_paused.then_some("paused: p goes on"))
    }

    /// What holds for the whole server, in lines.
    pub(super) fn header(&self) -> [String; 3] {
        let Some(now) = &self.now else { return ["…".to_owned(), String::new(), String::new()] };
        let mut kinds: Vec<_> = now.connections.iter().filter(|(_, count)| **count > 0).collect();
        kinds.sort();
        let kinds: Vec<_> =
            kinds.into_iter().map(|(kind, n)| format!("{} {}", plain(kind), count(u64::from(*n)))).collect();
        let (held, log) = (bytes(now.resident_bytes), bytes(now.log_buffered_bytes));
        let Rates { accepted, delivered, refused, records } = self.rates;
        [
            format!(
                "trunkline {}  up {}  memory {held}  log {} records, {log} in memory",
                plain(&now.version),
                duration(now.uptime_seconds),
                count(now.records)
            ),
            format!(
                "connections {}  {}  http {}",
                count(u64::from(now.sessions_total)),
                kinds.join("  "),
                count(u64::from(now.http_connections))
            ),
            format!(
                "in {}/s  out {}/s  written {}/s  refused {}/s",
                count(accepted as u64),
                count(delivered as u64),
                count(records as u64),
                count(refused as u64)
            ),
        ]
    }
}

/// With commas between thousands.
pub(super) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The two largest units that it has.
fn duration(seconds: u64) -> String {
    let rounded = match seconds {
        3600.. => seconds - seconds % 60,
        _ => seconds,
    };
    let text = humantime::format_duration(Duration::from_secs(rounded)).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

fn bytes(n: u64) -> String {
    match n {
        0..1_000_000 => format!("{} kB", n / 1000),
        1_000_000..1_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A server after so many milliseconds, with so many messages delivered to one session, which has so many to come.
    pub(crate) fn figures(unix_ms: u64, delivered: u64, lag: u64) -> Figures {
        let session = |identity: &str, delivered, lag| Standing {
            session_id: identity.to_owned(),
            identity: identity.to_owned(),
            workspace: "ws".to_owned(),
            connected_at_ms: 1000,
            fencing_epoch: 7,
            delivered,
            lag,
            ..Standing::default()
        };
        Figures {
            unix_ms,
            version: "1.2.3".to_owned(),
            uptime_seconds: 3_700,
            connections: [("agent".to_owned(), 2), ("user".to_owned(), 0)].into(),
            delivered,
            records: delivered,
            resident_bytes: 45_000_000,
            sessions: vec![session("ag::ws::b::1", delivered, lag), session("ag::ws::a::1", 5, 3)],
            sessions_total: 2,
            ..Figures::default()
        }
    }

    #[test]
    fn rates_are_of_two_looks_and_begin_anew_after_a_restart() {
        let mut view = View::new(Order::Lag);
        view.take(figures(61_000, 1000, 0));
        assert!(!view.is_timed() && view.rates() == Rates::default());
        view.take(figures(63_000, 4000, 20_000));
        assert!((view.rates().delivered - 1500.0).abs() < 0.01, "{:?}", view.rates());
        let first = &view.rows()[0];
        assert_eq!((first.identity.as_str(), first.delivered_per_s as u64), ("ag::ws::b::1", 1500));
        assert_eq!((first.lag().as_str(), first.held().as_str()), ("10,000+", "1m 2s"));
        view.take(figures(64_000, 0, 0));
        assert!(!view.is_timed() && view.rates() == Rates::default());
        assert_eq!(view.rows()[0].identity, "ag::ws::a::1");
    }

    #[test]
    fn the_order_is_the_readers_choice_and_a_pause_holds_it() {
        let mut view = View::new(Order::Name);
        view.take(figures(61_000, 1000, 0));
        assert_eq!(view.rows()[0].identity, "ag::ws::a::1");
        view.take(figures(62_000, 4000, 0));
        view.sort(Order::Out);
        assert_eq!(view.rows()[0].identity, "ag::ws::b::1");
        view.pause();
        view.take(figures(63_000, 9000, 0));
        assert_eq!(view.now().unwrap().delivered, 4000);
        view.scroll(5);
        assert_eq!(view.shown().len(), 1);
        view.scroll(isize::MIN);
        assert_eq!(view.shown().len(), 2);
    }

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!([0, 999, 1000, 1_234_567].map(count), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([5, 65, 3_700, 200_000].map(duration), ["5s", "1m 5s", "1h 1m", "2days 7h"]);
        assert_eq!([1_500, 45_000_000, 3_210_000_000].map(bytes), ["1 kB", "45.0 MB", "3.21 GB"]);
    }
}
