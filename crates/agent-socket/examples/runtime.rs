//! A runtime that says back, word by word, what clients of a Trunkline server tell it.
//!
//! `cargo run -p trunkline-agent-socket --features websocket --example runtime -- ws://127.0.0.1:4800/agent-socket`

use std::{error::Error, time::Duration};

use serde_json::json;
use tokio::time::sleep;
use trunkline_agent_socket::{
    Meta, Type,
    runtime::{Options, Runtime},
    server::{Ask, EmitError, Emitter, Handlers},
    transport::websocket,
};

struct Parrot;

impl Parrot {
    async fn answer(&self, ask: &Ask, emitter: &Emitter) -> Result<(), EmitError> {
        let turn = || Meta::turn(ask.turn_id().unwrap_or_default());
        emitter.emit(&ask.client_id, Type::TurnRunning, &ask.payload(), turn()).await?;
        let said = format!("you said: {}", ask.payload()["text"].as_str().unwrap_or("nothing"));
        for word in said.split_inclusive(' ') {
            emitter.emit(&ask.client_id, Type::TurnTextDelta, &json!({"delta": word}), turn()).await?;
            sleep(Duration::from_millis(20)).await;
        }
        emitter.emit(&ask.client_id, Type::TurnDone, &json!({}), turn()).await.map(drop)
    }
}

impl Handlers for Parrot {
    async fn start_turn(&self, ask: Ask, emitter: Emitter) {
        if let Err(error) = self.answer(&ask, &emitter).await {
            tracing::error!(%error, "a turn is not answered");
        }
    }
}

#[tokio::main(flavor = "current_thread")]
#[allow(clippy::print_stdout, reason = "that is what it is for")]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "ws://127.0.0.1:4800/agent-socket".to_owned());
    println!("a runtime at {url}");
    // Another one with every start.
    let generation = format!("parrot-{}", uuid::Uuid::now_v7());
    let options =
        Options { pause: Duration::from_millis(50), pause_max: Duration::from_millis(500), ..Options::new(generation) };
    let connect = move || websocket::connect(url.clone(), 1024 * 1024);
    let (runtime, run) = Runtime::new(options, Parrot, connect);
    run.await?;
    drop(runtime);
    Ok(())
}
