//! The demo's agent: any agent could be it. It is told what the user says as a message, answers to where that came from, and
//! streams what it says. What it did not finish comes again when it is started again, because it acknowledges.

use std::time::Duration;

use serde_json::json;
use tokio::time::sleep;
use trunkline_client::{self as sdk, Message, MessageType, Outgoing, Reconnect, State, task::Progress};

use super::{SESSION, SPECIFIER, WORKSPACE};
use crate::cli::{Done, Fault, block_on, client::Connect};

/// How fast it speaks.
const PAUSE: Duration = Duration::from_millis(35);

/// How long it thinks.
const THOUGHT: Duration = Duration::from_millis(400);

/// Pause before it says something again.
const RETRY: Duration = Duration::from_millis(300);

/// Without end, and soon: somebody is looking.
const RECONNECT: Reconnect =
    Reconnect { attempts: None, first: RETRY, longest: RETRY, factor: 1.0, jitter: 0.0, at_first: true };

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
        let who = sdk::Agent::builder(WORKSPACE, "assistant", SPECIFIER).at_least_once();
        let client = agent.connect.with(who)?.reconnect(RECONNECT).connect().await.map_err(Fault::from)?;
        let mut messages = client.messages();
        while let Some(message) = messages.next().await {
            while message.kind() == MessageType::Chat
                && let Err(error) = answer(agent, &client, &message).await
            {
                if let State::Ended { because, .. } = &*client.state().borrow() {
                    return Err(because.clone().into());
                }
                tracing::info!("{error}; answering again");
                sleep(RETRY).await;
            }
            message.acknowledge();
        }
        Ok(())
    })
}

async fn answer(agent: &Agent, client: &sdk::Client, message: &Message) -> Done {
    let said = message.text();
    let Some(to) = message.sender() else { return Ok(()) };
    let session = || client.welcome().map(|welcome| welcome.session_id.clone());
    let begun_in = session();
    // The same name when it is answered again.
    let id = message.about().and_then(|about| about.get("message_id").cloned()).unwrap_or_else(|| said.to_string());
    client.report(Progress::running("").summary("Thinking").to(to.as_str())).await?;
    if !agent.fast {
        sleep(THOUGHT).await;
    }
    let asked = ask_sandbox(agent, &said, &id).await;
    let words = words(&said, asked);
    for (n, piece) in words.split_inclusive(' ').enumerate() {
        let delta = json!({"type": "delta", "id": id, "text": piece, "start": n == 0});
        client.send(Outgoing::json(to.clone(), &delta)?).await?;
        if session() != begun_in {
            return Err("the connection broke in the middle of a sentence".into());
        }
        if !agent.fast {
            sleep(PAUSE).await;
        }
    }
    let whole = Outgoing::json(to, &json!({"id": id, "text": words}))?.of(MessageType::Chat).once(id);
    Ok(client.send_confirmed(whole).await?)
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
