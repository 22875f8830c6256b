//! How the view looks on a terminal.

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Layout, Rect},
    style::{Color, Modifier, Style, Stylize as _},
    text::{Line, Span},
    widgets::{Cell, Paragraph, Row, Sparkline, Table},
};

use super::view::{self, Order, View};

const KEYS: &str = " q ends  l i o n sorts by lag, in, out, name  p pauses  ↑ ↓ scroll";

/// A lag from which on a session is marked.
const LAG_WARNING: u64 = 100;

pub(super) fn draw(frame: &mut Frame<'_>, view: &mut View) {
    let rows = [Constraint::Length(3), Constraint::Length(4), Constraint::Min(3), Constraint::Length(1)];
    let [header, curve, table, footer] = Layout::vertical(rows).areas(frame.area());
    let [first, second, third] = view.header();
    let lines = [Line::from(first).bold(), Line::from(second), Line::from(third).fg(Color::Cyan)];
    frame.render_widget(Paragraph::new(lines.to_vec()), header);
    draw_curve(frame, view, curve);
    draw_table(frame, view, table);
    let notice = view
        .notice()
        .map(|notice| Span::styled(format!(" {notice} "), Style::new().fg(Color::Black).bg(Color::Yellow)));
    frame.render_widget(Line::from_iter([notice.unwrap_or_else(|| KEYS.dark_gray())]), footer);
}

/// Messages delivered in a second, the latest on the right.
fn draw_curve(frame: &mut Frame<'_>, view: &View, area: Rect) {
    let [title, curve] = Layout::vertical([Constraint::Length(1), Constraint::Min(1)]).areas(area);
    let most = view.history().iter().copied().max().unwrap_or(0);
    let caption = format!("out per second, up to {}", view::count(most));
    frame.render_widget(Paragraph::new(caption).dark_gray().alignment(Alignment::Right), title);
    let width = usize::from(curve.width);
    let skip = view.history().len().saturating_sub(width);
    let missing = width.saturating_sub(view.history().len());
    let points: Vec<u64> = std::iter::repeat_n(0, missing).chain(view.history().iter().copied().skip(skip)).collect();
    frame.render_widget(Sparkline::default().data(&points).style(Style::new().fg(Color::Green)), curve);
}

fn draw_table(frame: &mut Frame<'_>, view: &mut View, area: Rect) {
    let order = view.order();
    let marked = |name: &'static str, own: Order| {
        let style = Style::new().add_modifier(Modifier::REVERSED);
        Cell::from(name).style(if own == order { style.add_modifier(Modifier::BOLD) } else { style })
    };
    let plain = |name: &'static str| Cell::from(name).style(Style::new().add_modifier(Modifier::REVERSED));
    let header = Row::new([
        marked("IDENTITY", Order::Name),
        plain("WORKSPACE"),
        plain("HELD"),
        plain("EPOCH"),
        plain("BACK"),
        marked("IN/S", Order::In),
        marked("OUT/S", Order::Out),
        plain("UNACKED"),
        marked("LAG", Order::Lag),
    ]);
    let widths = [
        Constraint::Fill(3),
        Constraint::Fill(1),
        Constraint::Length(10),
        Constraint::Length(8),
        Constraint::Length(5),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(8),
        Constraint::Length(9),
    ];
    let rows = view.shown().iter().take(usize::from(area.height)).map(row);
    frame.render_widget(Table::new(rows, widths).header(header), area);
}

fn row(row: &view::Row) -> Row<'_> {
    let style = if row.lag >= LAG_WARNING { Style::new().fg(Color::Yellow) } else { Style::new() };
    Row::new([
        row.identity.clone(),
        row.workspace.clone(),
        row.held(),
        row.fencing_epoch.to_string(),
        row.reconnections.to_string(),
        view::count(row.accepted_per_s.round() as u64),
        view::count(row.delivered_per_s.round() as u64),
        view::count(row.unacknowledged),
        row.lag(),
    ])
    .style(style)
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};

    use super::{super::view::tests::figures, *};

    fn screen(view: &mut View, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, view)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        (0..height).map(line).collect()
    }

    #[test]
    fn a_screen_shows_connections_rates_lag_and_leases() {
        let mut view = View::new(Order::Lag);
        view.take(figures(61_000, 1000, 0));
        view.take(figures(62_000, 3500, 250));
        let shown = screen(&mut view, 110, 12);
        assert_eq!(shown[0], "trunkline 1.2.3  up 1h 1m  memory 45.0 MB  log 3,500 records, 0 kB in memory");
        assert_eq!(shown[1], "connections 2  agent 2  http 0");
        assert_eq!(shown[2], "in 0/s  out 2,500/s  written 2,500/s  refused 0/s");
        assert!(shown[3].ends_with("out per second, up to 2,500"), "{shown:#?}");
        assert!(shown[5].ends_with('█'), "{shown:#?}");
        let words: Vec<Vec<&str>> = shown[7..10].iter().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(words[0], ["IDENTITY", "WORKSPACE", "HELD", "EPOCH", "BACK", "IN/S", "OUT/S", "UNACKED", "LAG"]);
        assert_eq!(words[1], ["ag::ws::b::1", "ws", "1m", "1s", "7", "0", "0", "2,500", "0", "250"]);
        assert_eq!(words[2], ["ag::ws::a::1", "ws", "1m", "1s", "7", "0", "0", "0", "0", "3"]);
        assert!(shown[11].starts_with(" q ends"));
    }

    #[test]
    fn a_small_terminal_and_an_empty_view_are_shown_too() {
        let mut view = View::new(Order::Lag);
        assert_eq!(screen(&mut view, 20, 12)[0], "…");
        view.take(figures(61_000, 1000, 0));
        view.pause();
        let shown = screen(&mut view, 40, 11);
        assert!(shown[10].contains("paused"), "{shown:#?}");
        screen(&mut view, 1, 1);
    }
}
