//! Both sides in one program: a runtime that keeps its events, and a UI that misses nothing and notices what is stale.
//!
//! `cargo run -p trunkline-agent-socket --example quick_start`

use std::{error::Error, time::Duration};

use serde_json::json;
use tokio::{task::JoinSet, time::timeout};
use trunkline_agent_socket::{
    LocalUiState, Meta, Type,
    client::{self, Client},
    detect_stale_ui,
    server::{Ask, Emitter, Handlers, Options, Server},
    should_clear_thinking,
    store::MemoryStore,
    transport::{Broken, MemoryTransport},
};

/// A runtime that says back what it is told.
struct Parrot;

impl Handlers for Parrot {
    async fn start_turn(&self, ask: Ask, emitter: Emitter) {
        let turn = || Meta::turn(ask.turn_id().unwrap_or_default());
        let said = ask.payload()["text"].as_str().unwrap_or_default().to_owned();
        for (kind, payload) in [
            (Type::TurnQueued, ask.payload()),
            (Type::TurnPhase, json!({"phase": "thinking"})),
            (Type::TurnTextDelta, json!({"delta": "you said: "})),
            (Type::TurnTextDelta, json!({"delta": said})),
            (Type::TurnDone, json!({})),
        ] {
            if let Err(error) = emitter.emit(&ask.client_id, kind, &payload, turn()).await {
                tracing::error!(%error, "an event is lost");
            }
        }
    }
}

#[tokio::main(flavor = "current_thread")]
#[allow(clippy::print_stdout, reason = "that is what it is for")]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let server = Server::new(MemoryStore::default(), Parrot, Options::new("gen-1"));

    // 1. A connection: here in memory; `transport::websocket` has the others.
    let serves = server.clone();
    let connect = move || {
        let (server, (here, there)) = (serves.clone(), MemoryTransport::pair());
        let mut serving = JoinSet::new();
        serving.spawn(async move { server.serve(there).await });
        serving.detach_all();
        async move { Ok::<_, Broken>(here) }
    };
    let (client, run) = Client::new(client::Options::new("web-a"), connect);

    // 2. What the UI wants to see.
    client.on(Type::TurnPhase, |event| println!("phase: {}", event.value()["phase"]));
    client.on(Type::TurnTextDelta, |event| println!("text: {}", event.value()["delta"]));
    client.on(Type::TurnDone, |event| println!("done: {}", event.turn_id.as_deref().unwrap_or("?")));

    // 3. Connected, in a task that is ours.
    let mut tasks = JoinSet::new();
    tasks.spawn(run);
    client.start_turn(&json!({"text": "hello"}), "t-1").await?;
    let mut view = client.view();
    timeout(Duration::from_secs(5), view.wait_for(|view| view.seq == 5)).await??;

    // 4. A reload that remembers less than there is to know.
    let state = server.state("web-a").await?;
    let shown = LocalUiState {
        sending: true,
        known_turn_id: Some("t-1".to_owned()),
        runtime_generation: client.generation(),
        ..LocalUiState::default()
    };
    let stale = detect_stale_ui(&shown, &state);
    println!("stale: {:?}, do: {:?}, clear: {}", stale.reason, stale.action, should_clear_thinking(&shown, &state));
    drop((client, view));
    tasks.join_all().await.into_iter().collect::<Result<Vec<()>, _>>()?;
    Ok(())
}
