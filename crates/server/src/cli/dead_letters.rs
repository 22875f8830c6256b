//! `dead-letter`: messages that are not delivered again by themselves.

use serde_json::{Value, json};
use trunkline_client::operator::DeadLetter as Letter;

use super::{
    Done,
    admin::Ask,
    block_on,
    output::{Row, time},
};

#[derive(clap::Subcommand)]
pub(crate) enum DeadLetter {
    /// Lists messages that clients were lost over, one after the other.
    List {
        /// Only those for this one: an identity, or the topic of a group of tasks.
        #[arg(default_value = "")]
        owner: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Shows one of them, with what was sent.
    Show {
        /// Its id, as listed.
        id: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Has them delivered again, each to its receiver alone.
    Retry {
        /// Their ids, as listed.
        #[arg(required = true)]
        ids: Vec<String>,
        #[command(flatten)]
        ask: Ask,
    },
    /// Forgets them.
    Remove {
        /// Their ids, as listed.
        #[arg(required = true)]
        ids: Vec<String>,
        #[command(flatten)]
        ask: Ask,
    },
}

pub(crate) fn run(command: DeadLetter) -> Done {
    block_on(async {
        match command {
            DeadLetter::List { owner, ask } => {
                let operator = ask.connect.operator().await?;
                let rows = || async {
                    let mut all: Vec<Letter> = Vec::new();
                    loop {
                        let page = operator.dead_letters(&owner, all.last().map(|letter| letter.id.as_str())).await?;
                        if page.is_empty() {
                            return Ok(all.iter().map(row).collect());
                        }
                        all.extend(page);
                    }
                };
                ask.output.show(rows).await
            }
            DeadLetter::Show { id, ask } => {
                let letter = ask.connect.operator().await?.dead_letter(id).await?;
                let shown = std::str::from_utf8(&letter.payload)
                    .map_or_else(|_| json!(&letter.payload[..]), |text| json!(text));
                ask.output.print(&[row(&letter).into_iter().chain([("payload", shown)]).collect()]);
                Ok(())
            }
            DeadLetter::Retry { ids, ask } => {
                let operator = ask.connect.operator().await?;
                for id in ids {
                    let letter = operator.retry_dead_letter(&*id).await?;
                    ask.output.done(format_args!("delivered again to {}: {id}", letter.owner), row(&letter));
                }
                Ok(())
            }
            DeadLetter::Remove { ids, ask } => {
                let operator = ask.connect.operator().await?;
                for id in ids {
                    operator.remove_dead_letter(&*id).await?;
                    ask.output.done(format_args!("removed {id}"), vec![("id", json!(id))]);
                }
                Ok(())
            }
        }
    })
}

fn row(letter: &Letter) -> Row {
    let sent = i64::try_from(letter.sent_at_ms / 1000).map_or(Value::Null, time);
    vec![
        ("id", json!(letter.id)),
        ("owner", json!(letter.owner)),
        ("topic", json!(letter.topic)),
        ("from", json!(letter.source_topic)),
        ("bytes", json!(letter.size)),
        ("sent", sent),
        ("dead", time(letter.dead_at)),
        ("lost_sessions", json!(letter.lost_sessions)),
    ]
}
