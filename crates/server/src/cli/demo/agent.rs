//! The demo's agent: any agent could be it. It is told what the user says as a message, answers to where that came from, and
//! streams what it says. What it did not finish comes again when it is started again, because it acknowledges.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::{sync::mpsc, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use trunkline_proto::{
    own::Acknowledgement,
    v1::{
        AgentIdentity, ExtensionDeclaration, IncomingMessage, InitConnection, MessageType, ProgressReport, SendMessage,
        UpstreamMessage, aether_gateway_client::AetherGatewayClient, downstream_message::Payload as Down,
        init_connection::ClientType, upstream_message::Payload as Up,
    },
};

use super::{SESSION, SPECIFIER, WORKSPACE};
use crate::cli::{Done, block_on, client::Connect};

type Error = Box<dyn std::error::Error>;

/// How fast it speaks.
const PAUSE: Duration = Duration::from_millis(35);

/// How long it thinks.
const THOUGHT: Duration = Duration::from_millis(400);

/// Pause before it connects again.
const RETRY: Duration = Duration::from_millis(300);

const ACKNOWLEDGES: &str = "https://trunkline.dev/ext/ack/v1";

#[derive(clap::Args)]
pub(crate) struct Agent {
    /// The server's address for browsers and sandboxes.
    #[arg(long, value_name = "URL")]
    http: String,
    /// It says everything at once.
    #[arg(long)]
    fast: bool,
    #[command(flatten)]
    connect: Connect,
}

pub(crate) fn run(agent: &Agent) -> Done {
    let _ = rustls::crypto::ring::default_provider().install_default();
    block_on(async {
        loop {
            if let Err(error) = serve(agent).await {
                tracing::info!("{error}; connecting again");
            }
            sleep(RETRY).await;
        }
    })
}

async fn serve(agent: &Agent) -> Result<(), Error> {
    let mut client = AetherGatewayClient::new(agent.connect.channel().await?);
    let (up, frames) = mpsc::channel(64);
    let identity =
        AgentIdentity { workspace: WORKSPACE.into(), implementation: "assistant".into(), specifier: SPECIFIER.into() };
    let init = InitConnection {
        client_type: Some(ClientType::Agent(identity)),
        extensions: vec![ExtensionDeclaration { uri: ACKNOWLEDGES.into(), required: true, ..Default::default() }],
        ..InitConnection::default()
    };
    put(&up, Up::Init(init.into())).await?;
    let mut down = client.connect(ReceiverStream::new(frames)).await?.into_inner();
    while let Some(frame) = down.message().await? {
        if let Some(Down::Msg(message)) = frame.payload {
            if message.message_type == i32::from(MessageType::Chat) {
                answer(agent, &up, &message).await?;
            }
            let through = frame.delivery.map_or(0, |delivery| delivery.offset);
            put(&up, Up::Acknowledgement(Acknowledgement { through, shared: Vec::new() }.into())).await?;
        }
    }
    Ok(())
}

async fn put(up: &mpsc::Sender<UpstreamMessage>, payload: Up) -> Result<(), Error> {
    let frame = UpstreamMessage { payload: Some(payload), ..UpstreamMessage::default() };
    Ok(up.send(frame).await.map_err(|_| "the connection ended")?)
}

async fn answer(agent: &Agent, up: &mpsc::Sender<UpstreamMessage>, message: &IncomingMessage) -> Result<(), Error> {
    let said = String::from_utf8_lossy(&message.payload).into_owned();
    let to = &message.source_topic;
    // The same name when it is answered again.
    let about = message.about.as_ref().and_then(|about| about.entries.get("message_id").cloned());
    let id = about.unwrap_or_else(|| said.clone());
    let thinks = ProgressReport {
        recipient: to.clone(),
        state: "running".into(),
        summary: "Thinking".into(),
        ..ProgressReport::default()
    };
    put(up, Up::Progress(thinks.into())).await?;
    if !agent.fast {
        sleep(THOUGHT).await;
    }
    let asked = ask_sandbox(agent, &said, &id).await;
    let words = words(&said, asked);
    for (n, piece) in words.split_inclusive(' ').enumerate() {
        let delta = json!({"type": "delta", "id": id, "text": piece, "start": n == 0});
        send(up, to, MessageType::Opaque, &delta, "").await?;
        if !agent.fast {
            sleep(PAUSE).await;
        }
    }
    send(up, to, MessageType::Chat, &json!({"id": id, "text": words}), &id).await
}

async fn send(
    up: &mpsc::Sender<UpstreamMessage>,
    to: &str,
    kind: MessageType,
    payload: &Value,
    key: &str,
) -> Result<(), Error> {
    let message = SendMessage {
        target_topic: to.to_owned(),
        payload: payload.to_string().into(),
        message_type: kind.into(),
        idempotency_key: key.to_owned(),
        ..SendMessage::default()
    };
    put(up, Up::Send(message)).await
}

/// Has the sandbox make something of it; answers whether it will. Asked again, it is asked once.
async fn ask_sandbox(agent: &Agent, said: &str, key: &str) -> bool {
    let url = format!("{}/sessions/{SESSION}/commands", agent.http.trim_end_matches('/'));
    let order = json!({"type": "prompt", "text": said}).to_string();
    let asked = reqwest::Client::new().post(url).header("idempotency-key", key).body(order).send().await;
    asked.is_ok_and(|answer| answer.status().is_success())
}

fn words(said: &str, asked: bool) -> String {
    let beside = if asked {
        "The sandbox beside this chat is working on it now; what it makes appears there as it comes into being."
    } else {
        "The sandbox beside this chat is away just now, so you have only me."
    };
    format!(
        "You said: “{said}”. I am a process of my own that talks gRPC with the server, and I know nothing of browsers. {beside} \
        Open this page in a second tab: it follows along. Then stop me in the middle of a sentence, or restart the server: \
        I begin that sentence anew, and nothing that either of us said is lost."
    )
}
