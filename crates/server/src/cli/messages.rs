//! `send` and `tail`.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::{Value, json};
use trunkline_client::{MessageType, Outgoing, Topic, operator::TailItem};
use trunkline_core::{identity::Identity, topic::Target};

use super::{Done, Fault, block_on, client::Connect, output::plain, payload, say};

#[derive(clap::Args)]
pub(crate) struct Send {
    /// The topic, such as `ag::demo::greeter::bob`.
    target: String,
    /// What to send; `-` reads standard input.
    payload: String,
    /// What kind of message: chat, control, tool_call, event, metric, opaque.
    #[arg(long = "type", value_name = "TYPE", default_value = "chat")]
    kind: String,
    /// Who sends it [default: an agent in the target's workspace, or else a service].
    #[arg(long = "as", value_name = "IDENTITY")]
    sender: Option<String>,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connect: Connect,
}

#[derive(clap::Args)]
pub(crate) struct Tail {
    /// The topic, such as `ag::demo::greeter::bob`.
    topic: String,
    /// Begin with all that is retained.
    #[arg(long)]
    from_start: bool,
    /// End after so many.
    #[arg(long, value_name = "COUNT")]
    count: Option<usize>,
    /// Prints JSON, a line for each.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connect: Connect,
}

pub(crate) fn send(args: Send) -> Done {
    block_on(async {
        let kind = MessageType::from_str_name(&args.kind.to_uppercase());
        let kind = kind.ok_or_else(|| Fault::usage(format!("unknown type {:?}", args.kind)))?;
        let payload = payload(args.payload)?;
        let sender = sender(args.sender.as_deref(), &args.target)?;
        let message = Outgoing::new(args.target.parse::<Topic>()?, payload).of(kind);
        let client = args.connect.client_as(Some(&sender.to_string())).await?;
        client.send_confirmed(message).await.map_err(Fault::from)?;
        if args.json {
            say(json!({"to": args.target, "as": sender.to_string()}));
        } else {
            say(format_args!("sent to {} as {sender}", args.target));
        }
        client.close().await;
        Ok(())
    })
}

fn sender(wanted: Option<&str>, target: &str) -> Result<Identity, Box<dyn std::error::Error>> {
    if let Some(wanted) = wanted {
        return Ok(Identity::parse(wanted)?);
    }
    let own = uuid::Uuid::new_v4().to_string();
    Ok(match Target::parse(target)?.workspace() {
        Some(workspace) => Identity::agent(workspace, "trunkline-cli", &own)?,
        None => Identity::service("trunkline-cli", &own)?,
    })
}

pub(crate) fn tail(args: Tail) -> Done {
    block_on(async {
        let mut items = args.connect.operator().await?.tail(args.topic, args.from_start).await.map_err(Fault::from)?;
        for _ in 0..args.count.unwrap_or(usize::MAX) {
            let item = items.next().await.map_err(Fault::from)?.ok_or(Fault::Gone)?;
            if args.json {
                say(as_json(&item));
            } else {
                show(&item);
            }
        }
        Ok(())
    })
}

/// Offset, time, sender, type, and the payload as text as far as it is text.
fn show(item: &TailItem) {
    if item.gap_through > 0 {
        return say(format_args!("-- not retained any more, through {} --", item.gap_through));
    }
    let (kind, text) = (kind(item), String::from_utf8_lossy(&item.payload));
    let source = if item.source_topic.is_empty() { "-" } else { &item.source_topic };
    say(plain(&format!("{} {} {source} {kind} {text}", item.offset, item.timestamp_ms)));
}

/// The payload as JSON if it is that, as text if it is that, and else as it is, in base64.
fn as_json(item: &TailItem) -> Value {
    if item.gap_through > 0 {
        return json!({"gap_through": item.gap_through});
    }
    let mut value = json!({
        "offset": item.offset,
        "timestamp_ms": item.timestamp_ms,
        "source": item.source_topic,
        "workspace": item.workspace,
        "type": kind(item),
    });
    let payload = match (serde_json::from_slice(&item.payload), std::str::from_utf8(&item.payload)) {
        (Ok(json), _) => ("payload", json),
        (Err(_), Ok(text)) => ("payload", json!(text)),
        (Err(_), Err(_)) => ("payload_base64", json!(BASE64.encode(&item.payload))),
    };
    value[payload.0] = payload.1;
    value
}

fn kind(item: &TailItem) -> &'static str {
    MessageType::try_from(item.message_type).map_or("?", |kind| kind.as_str_name())
}
