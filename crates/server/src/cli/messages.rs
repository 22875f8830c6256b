//! `send` and `tail`.

use trunkline_client::{MessageType, Outgoing, Topic};
use trunkline_core::{identity::Identity, topic::Target};
use trunkline_proto::own::{TailItem, TailRequest, operator_client::OperatorClient};

use super::{
    Done, Fault, block_on,
    client::{Connect, said},
    payload, say,
};

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
        client.send_confirmed(message).await?;
        say(format_args!("sent to {} as {sender}", args.target));
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
        let request = TailRequest { topic: args.topic, from_start: args.from_start };
        let mut client = OperatorClient::new(args.connect.channel().await?);
        let mut items = client.tail(args.connect.sign(request)?).await.map_err(|e| said(&e))?.into_inner();
        let mut left = args.count.unwrap_or(usize::MAX);
        while left > 0
            && let Some(item) = items.message().await.map_err(|e| said(&e))?
        {
            show(&item);
            left -= 1;
        }
        Ok(())
    })
}

/// Offset, time, sender, type, and the payload as text as far as it is text.
fn show(item: &TailItem) {
    if item.gap_through > 0 {
        return say(format_args!("-- not retained any more, through {} --", item.gap_through));
    }
    let kind = MessageType::try_from(item.message_type).map_or("?", |kind| kind.as_str_name());
    let text = String::from_utf8_lossy(&item.payload);
    let text: String = text.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect();
    let source = if item.source_topic.is_empty() { "-" } else { &item.source_topic };
    say(format_args!("{} {} {source} {kind} {text}", item.offset, item.timestamp_ms));
}
